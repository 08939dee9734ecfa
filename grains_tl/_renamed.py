"""Names that moved: the old ones still work for one release, with a DeprecationWarning that names the new place."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

#: Where a name of release 0.1 stands now, below ``grains_tl``.
MOVED = {
    "BASELINES": "baselines.BASELINES",
    "HeadVectors": "baselines.HeadVectors",
    "baseline_draws": "baselines.baseline_draws",
    "baseline_vectors": "baselines.baseline_vectors",
    "bootstrap_vectors": "baselines.bootstrap_vectors",
    "caa_differences": "baselines.caa_differences",
    "head_vectors": "baselines.head_vectors",
    "lora_adapter": "baselines.lora_adapter",
    "orthogonal_direction_vectors": "baselines.orthogonal_direction_vectors",
    "random_direction_vectors": "baselines.random_direction_vectors",
    "random_token_differences": "baselines.random_token_differences",
    "shuffled_label_vectors": "baselines.shuffled_label_vectors",
    "with_system_prompt": "baselines.with_system_prompt",
    "Benchmark": "records.Benchmark",
    "letters": "records.letters",
    "load_benchmark": "records.load_benchmark",
    "neutral_texts": "records.neutral_texts",
    "Comparison": "evaluate.Comparison",
    "Setting": "evaluate.Setting",
    "effect_at_kl": "evaluate.effect_at_kl",
    "generation_quality": "evaluate.generation_quality",
    "grid": "evaluate.grid",
    "measure": "evaluate.measure",
    "next_token_kl": "evaluate.next_token_kl",
    "record_effects": "evaluate.record_effects",
    "retention": "evaluate.retention",
    "summarize": "evaluate.summarize",
    "sweep_records": "evaluate.sweep_records",
    "text_costs": "evaluate.text_costs",
    "text_quality": "evaluate.text_quality",
    "two_sided": "evaluate.two_sided",
    "Curves": "faithfulness.Curves",
    "agreement_map": "faithfulness.agreement_map",
    "curves": "faithfulness.curves",
    "random_weights_check": "faithfulness.random_weights_check",
    "rank_agreement": "faithfulness.rank_agreement",
    "seed_agreement": "faithfulness.seed_agreement",
    "Differences": "vectors.Differences",
    "collect_differences": "vectors.collect_differences",
    "read_out": "vectors.read_out",
    "reduce_vectors": "vectors.reduce_vectors",
    "Grouped": "attribution.Grouped",
    "Selection": "attribution.Selection",
    "attribute_all": "attribution.attribute_all",
    "group": "attribution.group",
    "select_groups": "attribution.select_groups",
    "select_tokens": "attribution.select_tokens",
    "ImageSpan": "tokens.ImageSpan",
    "TokenRules": "tokens.TokenRules",
    "TokenizedPair": "tokens.TokenizedPair",
    "token_rules": "tokens.token_rules",
    "tokenize_pairs": "tokens.tokenize_pairs",
    "attribution_share": "plotting.attribution_share",
    "plot_captions": "plotting.plot_captions",
    "plot_comparison": "plotting.plot_comparison",
    "plot_controls": "plotting.plot_controls",
    "plot_convergence": "plotting.plot_convergence",
    "plot_cosines": "plotting.plot_cosines",
    "plot_cost": "plotting.plot_cost",
    "plot_curves": "plotting.plot_curves",
    "plot_heatmap": "plotting.plot_heatmap",
    "plot_image_attribution": "plotting.plot_image_attribution",
    "plot_layers": "plotting.plot_layers",
    "plot_patching": "plotting.plot_patching",
    "plot_probes": "plotting.plot_probes",
    "plot_records": "plotting.plot_records",
    "plot_token_logprobs": "plotting.plot_token_logprobs",
    "plot_tokens": "plotting.plot_tokens",
    "plot_yes_no": "plotting.plot_yes_no",
    "binary_accuracy": "inference.binary_accuracy",
    "mc1": "inference.mc1",
    "mc2": "inference.mc2",
    "response_logprobs": "inference.response_logprobs",
    "score_choices": "inference.score_choices",
    "cache_hook": "hooks.cache_hook",
    "interpolate_hook": "hooks.interpolate_hook",
    "mask_hook": "hooks.mask_hook",
    "steer_hook": "hooks.steer_hook",
    "export_gguf": "export.export_gguf",
    "export_hf": "export.export_hf",
    "vllm_interventions": "export.vllm_interventions",
    "lm_eval": "evaluate.harness",
}


def forward(package: str, name: str) -> Any:
    """The value of a name that moved.

    Raises:
        AttributeError: the package has never had such a name.
    """
    if name not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    place = MOVED[name]
    warnings.warn(
        f"gr.{name} is gr.{place} now; the old name goes in the next release", DeprecationWarning, stacklevel=3
    )
    value: Any = importlib.import_module(package)
    for part in place.split("."):
        value = getattr(value, part)
    return value
