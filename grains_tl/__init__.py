"""GrAInS on TransformerLens hook points: which tokens cause a behaviour, which direction carries it, does it steer.

The story, in order: ``load_model`` and ``load_pairs``; ``attribute``; ``build_vectors``; ``vectors.hooks``; measure.
"""

from grains_tl import analysis
from grains_tl.attribution import attribute, attribute_all, interpolate_hook
from grains_tl.caching import Differences, cache_hook, collect_differences, read_out
from grains_tl.controls import caa_differences, random_direction_vectors, random_token_differences
from grains_tl.data import load_bundled, load_pairs
from grains_tl.evaluate import Setting, measure, next_token_kl
from grains_tl.faithfulness import compare_attributions
from grains_tl.generation import generate
from grains_tl.masking import Selection, mask_hook, select_tokens
from grains_tl.models import load_model
from grains_tl.pipeline import build_vectors
from grains_tl.plotting import (
    plot_controls,
    plot_cosines,
    plot_layers,
    plot_patching,
    plot_probes,
    plot_tokens,
    show_tokens,
)
from grains_tl.scoring import score_pairs
from grains_tl.selfcheck import check_model
from grains_tl.steering import steer_hook
from grains_tl.sweep import sweep
from grains_tl.tokens import TokenizedPair, TokenRules, token_rules, tokenize_pairs
from grains_tl.types import Attribution, PreferencePair
from grains_tl.vectors import SteeringVectors, load_vectors, reduce_vectors

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "Differences",
    "PreferencePair",
    "Selection",
    "Setting",
    "SteeringVectors",
    "TokenRules",
    "TokenizedPair",
    "analysis",
    "attribute",
    "attribute_all",
    "build_vectors",
    "caa_differences",
    "cache_hook",
    "check_model",
    "collect_differences",
    "compare_attributions",
    "generate",
    "interpolate_hook",
    "load_bundled",
    "load_model",
    "load_pairs",
    "load_vectors",
    "mask_hook",
    "measure",
    "next_token_kl",
    "plot_controls",
    "plot_cosines",
    "plot_layers",
    "plot_patching",
    "plot_probes",
    "plot_tokens",
    "random_direction_vectors",
    "random_token_differences",
    "read_out",
    "reduce_vectors",
    "score_pairs",
    "select_tokens",
    "show_tokens",
    "steer_hook",
    "sweep",
    "token_rules",
    "tokenize_pairs",
]
