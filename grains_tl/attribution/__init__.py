"""Which input tokens cause a behaviour: attribution methods, their scores, and the choice of tokens by score."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
