"""Hooks as plain ``(name, fn)`` pairs for ``run_with_hooks`` and ``model.hooks``: steer, mask, cache, interpolate.

Every function here is pure: it returns hooks and changes nothing. The package imports from
``inference``, ``tokens`` and what lies below them; ``attribution`` and everything above import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
