"""What the package is given: preference pairs, multiple-choice questions, pictures, benchmark files, splits.

It imports from ``types`` and ``_util`` alone; everything that takes records imports from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
