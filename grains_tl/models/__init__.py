"""The only package that knows TransformerLens and transformers: loading, running, identity, precision."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
