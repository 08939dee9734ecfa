"""One pass over a batch: objectives, batches, log-probabilities, restarts from a layer, choices, generation.

It imports from ``tokens``, ``models`` and what lies below them; ``hooks``, ``attribution`` and everything above
import from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
