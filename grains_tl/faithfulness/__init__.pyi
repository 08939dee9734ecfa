from .agreement import agreement_map as agreement_map
from .agreement import random_weights_check as random_weights_check
from .agreement import rank_agreement as rank_agreement
from .agreement import seed_agreement as seed_agreement
from .compare import compare_attributions as compare_attributions
from .deletion import Curves as Curves
from .deletion import curves as curves
from .judging import Judging as Judging

__all__: list[str]
