from .cache import cache_hook as cache_hook
from .gate import ThresholdGate as ThresholdGate
from .interpolate import interpolate_hook as interpolate_hook
from .mask import Mask as Mask
from .mask import mask_hook as mask_hook
from .steer import steer_hook as steer_hook

__all__: list[str]
