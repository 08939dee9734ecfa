from .controls import bootstrap_vectors as bootstrap_vectors
from .controls import caa_differences as caa_differences
from .controls import orthogonal_direction_vectors as orthogonal_direction_vectors
from .controls import random_direction_vectors as random_direction_vectors
from .controls import random_token_differences as random_token_differences
from .controls import shuffled_label_vectors as shuffled_label_vectors
from .draws import BASELINES as BASELINES
from .draws import baseline_draws as baseline_draws
from .draws import baseline_vectors as baseline_vectors
from .heads import HeadVectors as HeadVectors
from .heads import head_vectors as head_vectors
from .lora import LoraRun as LoraRun
from .lora import lora_adapter as lora_adapter
from .prompting import with_system_prompt as with_system_prompt

__all__: list[str]
