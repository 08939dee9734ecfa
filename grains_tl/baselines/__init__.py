"""What a steering vector is to be compared with, measured in the same way: other recipes, chance, prompting, training.

``residual`` has every vector on the residual stream behind one signature; ``heads`` steers attention heads (ITI),
``prompting`` writes a system prompt into the records, ``lora`` trains on them.
"""

from grains_tl.baselines.heads import HeadVectors, head_vectors
from grains_tl.baselines.lora import LoraRun, lora_adapter
from grains_tl.baselines.prompting import with_system_prompt
from grains_tl.baselines.records import BuildingRecords
from grains_tl.baselines.residual import BASELINES, baseline_draws, baseline_vectors

__all__ = [
    "BASELINES",
    "BuildingRecords",
    "HeadVectors",
    "LoraRun",
    "baseline_draws",
    "baseline_vectors",
    "head_vectors",
    "lora_adapter",
    "with_system_prompt",
]
