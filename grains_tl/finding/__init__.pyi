from .api import find_vector as find_vector
from .auditing import Audit as Audit
from .auditing import audit as audit
from .result import Found as Found

__all__: list[str]
