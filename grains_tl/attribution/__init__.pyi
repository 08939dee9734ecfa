from .api import attribute as attribute
from .api import attribute_all as attribute_all
from .groups import Grouped as Grouped
from .groups import group as group
from .groups import select_groups as select_groups
from .result import Attribution as Attribution
from .selection import Selection as Selection
from .selection import select_tokens as select_tokens

__all__: list[str]
