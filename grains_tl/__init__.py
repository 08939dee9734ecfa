"""GrAInS on TransformerLens hook points: which tokens cause a behaviour, which direction carries it, does it steer.

The story, in order: ``load_model`` and ``load_pairs``; ``attribute``; ``build_vectors``; ``vectors.hooks``; measure.
"""

from grains_tl.attribution import attribute, attribute_all, interpolate_hook
from grains_tl.baselines import (
    BASELINES,
    HeadVectors,
    baseline_draws,
    baseline_vectors,
    head_vectors,
    lora_adapter,
    with_system_prompt,
)
from grains_tl.caching import Differences, cache_hook, collect_differences, read_out
from grains_tl.comparison import Comparison, compare_with_controls
from grains_tl.controls import (
    bootstrap_vectors,
    caa_differences,
    orthogonal_direction_vectors,
    random_direction_vectors,
    random_token_differences,
    shuffled_label_vectors,
)
from grains_tl.data import load_bundled, load_pairs
from grains_tl.evaluate import Setting, measure, next_token_kl
from grains_tl.faithfulness import compare_attributions
from grains_tl.generation import generate
from grains_tl.masking import Selection, mask_hook, select_tokens
from grains_tl.models import load_model
from grains_tl.pipeline import build_vectors
from grains_tl.plotting import plot_controls, plot_layers, plot_tokens, show_tokens
from grains_tl.scoring import score_pairs
from grains_tl.selfcheck import check_model
from grains_tl.steering import steer_hook
from grains_tl.sweep import sweep
from grains_tl.tokens import TokenizedPair, TokenRules, token_rules, tokenize_pairs
from grains_tl.types import Attribution, PreferencePair
from grains_tl.vectors import SteeringVectors, load_vectors, reduce_vectors

__version__ = "0.1.0"

__all__ = [
    "BASELINES",
    "Attribution",
    "Comparison",
    "Differences",
    "HeadVectors",
    "PreferencePair",
    "Selection",
    "Setting",
    "SteeringVectors",
    "TokenRules",
    "TokenizedPair",
    "attribute",
    "attribute_all",
    "baseline_draws",
    "baseline_vectors",
    "bootstrap_vectors",
    "build_vectors",
    "caa_differences",
    "cache_hook",
    "check_model",
    "collect_differences",
    "compare_attributions",
    "compare_with_controls",
    "generate",
    "head_vectors",
    "interpolate_hook",
    "load_bundled",
    "load_model",
    "load_pairs",
    "load_vectors",
    "lora_adapter",
    "mask_hook",
    "measure",
    "next_token_kl",
    "orthogonal_direction_vectors",
    "plot_controls",
    "plot_layers",
    "plot_tokens",
    "random_direction_vectors",
    "random_token_differences",
    "read_out",
    "reduce_vectors",
    "score_pairs",
    "select_tokens",
    "show_tokens",
    "shuffled_label_vectors",
    "steer_hook",
    "sweep",
    "token_rules",
    "tokenize_pairs",
    "with_system_prompt",
]
