from .pairs import TokenizedPair as TokenizedPair
from .pairs import tokenize_pairs as tokenize_pairs
from .patches import ImageSpan as ImageSpan
from .rules import TokenRules as TokenRules
from .rules import token_rules as token_rules

__all__: list[str]
