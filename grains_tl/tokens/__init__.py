"""From text and images to token ids: BOS rules, chat templates, records as ids, image patches.

It imports from ``models``, ``records`` and ``_util``; ``inference`` and everything above import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
