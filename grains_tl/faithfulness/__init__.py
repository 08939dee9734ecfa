"""Whether an attribution can be trusted: deletion curves, agreement between methods, comparison by effect.

It imports from ``baselines``, ``evaluate``, ``vectors`` and what lies below them; only ``plotting``, ``demo`` and
``cli`` import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
