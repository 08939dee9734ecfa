"""Which input tokens cause a behaviour: attribution methods, their scores, and the choice of tokens by score.

It imports from ``hooks``, ``inference``, ``tokens`` and what lies below them; ``vectors`` and everything above import
from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
