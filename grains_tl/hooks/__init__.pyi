from .cache import cache_hook as cache_hook
from .gate import ThresholdGate as ThresholdGate
from .interpolate import interpolate_hook as interpolate_hook
from .layer_gates import FunctionGate as FunctionGate
from .mask import Mask as Mask
from .mask import mask_hook as mask_hook
from .reading_gates import CosineGate as CosineGate
from .reading_gates import ProbeGate as ProbeGate
from .steer import steer_hook as steer_hook
from .weights import Weighted as Weighted

__all__: list[str]
