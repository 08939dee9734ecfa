from .choices import binary_accuracy as binary_accuracy
from .choices import mc1 as mc1
from .choices import mc2 as mc2
from .choices import score_choices as score_choices
from .continuations import Continuations as Continuations
from .generation import generate as generate
from .logprobs import response_logprobs as response_logprobs
from .logprobs import score_pairs as score_pairs

__all__: list[str]
