"""Steering to play with: in a notebook with menus and a slider, or as one page computed beforehand."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
