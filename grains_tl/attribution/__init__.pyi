from .api import attribute as attribute
from .api import attribute_all as attribute_all
from .gradient_methods import AttentionAware as AttentionAware
from .gradient_methods import DiscretizedIG as DiscretizedIG
from .gradient_methods import ExpectedGradients as ExpectedGradients
from .gradient_methods import GradientXInput as GradientXInput
from .gradient_methods import IntegratedGradients as IntegratedGradients
from .gradient_methods import SequentialIG as SequentialIG
from .gradient_methods import SmoothGrad as SmoothGrad
from .groups import Grouped as Grouped
from .groups import group as group
from .groups import select_groups as select_groups
from .method_base import Method as Method
from .removal_methods import LeaveKOut as LeaveKOut
from .removal_methods import LeaveOneOut as LeaveOneOut
from .result import Attribution as Attribution
from .selection import Selection as Selection
from .selection import select_tokens as select_tokens
from .top_k import TopK as TopK
from .weights import prompt_weights as prompt_weights

__all__: list[str]
