"""The only package that knows TransformerLens and transformers: loading, running, identity, precision.

It imports from ``types`` and ``_util`` alone; everything that runs a model imports from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
