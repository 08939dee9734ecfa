"""What the package is given: preference pairs, multiple-choice questions, pictures, benchmark files, splits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
