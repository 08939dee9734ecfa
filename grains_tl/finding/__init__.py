"""From a person's own preference records to a vector that steers, or the finding that none does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
