from .api import find_vector as find_vector
from .result import Found as Found

__all__: list[str]
