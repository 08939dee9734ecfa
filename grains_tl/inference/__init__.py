"""One pass over a batch: objectives, batches, log-probabilities, restarts from a layer, choices, generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
