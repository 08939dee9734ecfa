"""What a steering vector must beat: other recipes, chance, prompting and training, measured in the same way."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
