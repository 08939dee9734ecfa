"""How much a vision-language model says that is not in the picture: yes/no questions, captions, judged answers.

The measures take plain answers and margins, so they serve any model; the readers take the published files as they are.
The package imports from ``records`` and ``_util`` alone; ``demo`` imports from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
