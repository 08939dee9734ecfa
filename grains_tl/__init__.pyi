from . import (
    analysis as analysis,
)
from . import (
    attribution as attribution,
)
from . import (
    baselines as baselines,
)
from . import (
    evaluate as evaluate,
)
from . import (
    exploring as exploring,
)
from . import (
    faithfulness as faithfulness,
)
from . import (
    finding as finding,
)
from . import (
    hallucination as hallucination,
)
from . import (
    hooks as hooks,
)
from . import (
    inference as inference,
)
from . import (
    models as models,
)
from . import (
    plotting as plotting,
)
from . import (
    records as records,
)
from . import (
    tokens as tokens,
)
from . import (
    vectors as vectors,
)
from ._util.settings import settings as settings
from .attribution.api import attribute as attribute
from .attribution.result import Attribution as Attribution
from .evaluate.choosing import Choice as Choice
from .evaluate.choosing import choose as choose
from .evaluate.choosing import report_choice as report_choice
from .evaluate.controls import compare_with_controls as compare_with_controls
from .evaluate.model_check import check_model as check_model
from .evaluate.sweeps import sweep as sweep
from .exploring.api import explore as explore
from .faithfulness.compare import compare_attributions as compare_attributions
from .finding.api import find_vector as find_vector
from .finding.auditing import audit as audit
from .hooks.mask import Mask as Mask
from .inference.generation import generate as generate
from .inference.logprobs import score_pairs as score_pairs
from .models.loading import load_model as load_model
from .models.loading import wrap_model as wrap_model
from .plotting.tokens import show_tokens as show_tokens
from .records.choices import MultipleChoice as MultipleChoice
from .records.loading import load_bundled as load_bundled
from .records.loading import load_pairs as load_pairs
from .records.pairs import PreferencePair as PreferencePair
from .records.splits import split_records as split_records
from .vectors import export as export
from .vectors.build import build_vectors as build_vectors
from .vectors.files import load_vectors as load_vectors
from .vectors.steering import Steering as Steering
from .vectors.steering_vectors import SteeringVectors as SteeringVectors

__version__: str
__all__: list[str]
