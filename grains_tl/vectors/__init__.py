"""Which direction carries a behaviour: read-out, differences, reduction, building, files, export.

It imports from ``attribution``, ``hooks``, ``inference`` and what lies below them; ``baselines``, ``evaluate`` and
everything above import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
