from .api import attribute as attribute
from .api import attribute_all as attribute_all
from .groups import Grouped as Grouped
from .groups import group as group
from .groups import select_groups as select_groups
from .methods import AttentionAware as AttentionAware
from .methods import DiscretizedIG as DiscretizedIG
from .methods import ExpectedGradients as ExpectedGradients
from .methods import GradientXInput as GradientXInput
from .methods import IntegratedGradients as IntegratedGradients
from .methods import LeaveKOut as LeaveKOut
from .methods import LeaveOneOut as LeaveOneOut
from .methods import Method as Method
from .methods import SequentialIG as SequentialIG
from .methods import SmoothGrad as SmoothGrad
from .result import Attribution as Attribution
from .selection import Selection as Selection
from .selection import select_tokens as select_tokens
from .top_k import TopK as TopK

__all__: list[str]
