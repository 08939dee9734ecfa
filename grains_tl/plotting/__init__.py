"""Pictures of tokens, sweeps, controls, costs and image patches.

Figures are made without pyplot, so no window opens and nothing stays open; they show themselves in notebooks all the
same. Nothing global in matplotlib changes. Tokens and names are data: they are drawn literally, never read as math text
or markup. The package imports from all packages below it and is the only one that knows matplotlib and circuitsvis;
``demo``, ``exploring`` and ``cli`` import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
