"""GrAInS on TransformerLens hook points: which tokens cause a behaviour, which direction carries it, does it steer.

The story, in order: ``load_model`` and ``load_pairs``; ``attribute``; ``build_vectors``; ``vectors.hooks``; measure.
"""

from grains_tl import analysis, lm_eval
from grains_tl.agreement import agreement_map, random_weights_check, rank_agreement, seed_agreement
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
from grains_tl.choices import MultipleChoice, binary_accuracy, mc1, mc2, score_choices
from grains_tl.choosing import Choice, choose, report_choice, split_records
from grains_tl.comparison import Comparison, compare_with_controls
from grains_tl.controls import (
    bootstrap_vectors,
    caa_differences,
    orthogonal_direction_vectors,
    random_direction_vectors,
    random_token_differences,
    shuffled_label_vectors,
)
from grains_tl.costs import letters, neutral_texts, retention, text_costs
from grains_tl.curves import Curves, curves
from grains_tl.data import load_bundled, load_pairs
from grains_tl.effects import record_effects, two_sided
from grains_tl.equal_cost import effect_at_kl
from grains_tl.evaluate import Setting, measure, next_token_kl
from grains_tl.export import export_gguf, export_hf, vllm_interventions
from grains_tl.faithfulness import compare_attributions
from grains_tl.generation import generate
from grains_tl.groups import Grouped, group, select_groups
from grains_tl.masking import Selection, mask_hook, select_tokens
from grains_tl.models import load_model
from grains_tl.patches import ImageSpan
from grains_tl.pipeline import build_vectors
from grains_tl.plotting import (
    attribution_share,
    plot_captions,
    plot_comparison,
    plot_controls,
    plot_convergence,
    plot_cosines,
    plot_cost,
    plot_curves,
    plot_heatmap,
    plot_image_attribution,
    plot_layers,
    plot_patching,
    plot_probes,
    plot_records,
    plot_token_logprobs,
    plot_tokens,
    plot_yes_no,
    show_tokens,
)
from grains_tl.quality import generation_quality, text_quality
from grains_tl.readers import Benchmark, load_benchmark
from grains_tl.responses import response_logprobs
from grains_tl.scoring import score_pairs
from grains_tl.selfcheck import check_model
from grains_tl.steering import steer_hook
from grains_tl.summary import summarize
from grains_tl.sweep import grid, sweep, sweep_records
from grains_tl.tokens import TokenizedPair, TokenRules, token_rules, tokenize_pairs
from grains_tl.types import Attribution, PreferencePair
from grains_tl.vectors import SteeringVectors, load_vectors, reduce_vectors

__version__ = "0.1.0"

__all__ = [
    "BASELINES",
    "Attribution",
    "Benchmark",
    "Choice",
    "Comparison",
    "Curves",
    "Differences",
    "Grouped",
    "HeadVectors",
    "ImageSpan",
    "MultipleChoice",
    "PreferencePair",
    "Selection",
    "Setting",
    "SteeringVectors",
    "TokenRules",
    "TokenizedPair",
    "agreement_map",
    "analysis",
    "attribute",
    "attribute_all",
    "attribution_share",
    "baseline_draws",
    "baseline_vectors",
    "binary_accuracy",
    "bootstrap_vectors",
    "build_vectors",
    "caa_differences",
    "cache_hook",
    "check_model",
    "choose",
    "collect_differences",
    "compare_attributions",
    "compare_with_controls",
    "curves",
    "effect_at_kl",
    "export_gguf",
    "export_hf",
    "generate",
    "generation_quality",
    "grid",
    "group",
    "head_vectors",
    "interpolate_hook",
    "letters",
    "lm_eval",
    "load_benchmark",
    "load_bundled",
    "load_model",
    "load_pairs",
    "load_vectors",
    "lora_adapter",
    "mask_hook",
    "mc1",
    "mc2",
    "measure",
    "neutral_texts",
    "next_token_kl",
    "orthogonal_direction_vectors",
    "plot_captions",
    "plot_comparison",
    "plot_controls",
    "plot_convergence",
    "plot_cosines",
    "plot_cost",
    "plot_curves",
    "plot_heatmap",
    "plot_image_attribution",
    "plot_layers",
    "plot_patching",
    "plot_probes",
    "plot_records",
    "plot_token_logprobs",
    "plot_tokens",
    "plot_yes_no",
    "random_direction_vectors",
    "random_token_differences",
    "random_weights_check",
    "rank_agreement",
    "read_out",
    "record_effects",
    "reduce_vectors",
    "report_choice",
    "response_logprobs",
    "retention",
    "score_choices",
    "score_pairs",
    "seed_agreement",
    "select_groups",
    "select_tokens",
    "show_tokens",
    "shuffled_label_vectors",
    "split_records",
    "steer_hook",
    "summarize",
    "sweep",
    "sweep_records",
    "text_costs",
    "text_quality",
    "token_rules",
    "tokenize_pairs",
    "two_sided",
    "vllm_interventions",
    "with_system_prompt",
]
