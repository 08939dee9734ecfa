"""Can an attribution be trusted: deletion curves, agreement between methods, comparison by effect."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
