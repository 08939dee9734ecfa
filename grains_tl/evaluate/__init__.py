"""Does a vector steer, and at what price: sweeps, choice of a setting, costs, controls, equal-cost comparisons."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
