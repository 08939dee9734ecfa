"""What a build and a sweep will take, before any weights are loaded.

1. Tokens: the package itself runs on narrow stand-ins of the same architecture, with records of the same lengths, and its
   passes are counted. Which tokens share a pass does not depend on the width, and counts are polynomials in the depth:
   straight lines for a build, parabolas for a sweep. Three depths give them.
2. Operations: the counts times the real shape's weights.
3. Memory: the largest passes that were counted run once more in the real shape, on PyTorch's meta device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from typing_extensions import override

from grains_tl._util.errors import MODEL_ERRORS, OptionError, require_from_outside
from grains_tl._util.settings import current, settings
from grains_tl.attribution.methods import METHODS
from grains_tl.finding.pass_memory import cache_bytes, pass_bytes, weight_bytes
from grains_tl.finding.workload import ALL_JOBS, USUAL_JOBS, Workload
from grains_tl.models.operations import Operations, count_operations, floating_point_operations
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.models.shapes import random_bridge, random_hugging_face, shape_config
from grains_tl.types import BridgeModel

GIB = 2**30

#: Blocks of the stand-ins; a model with no more of them has one of its own depth.
DEPTHS = (2, 3, 4)


@dataclass(frozen=True, repr=False)
class RunPlan:
    """What work of some size takes on a model of some shape.

    Attributes:
        name: of the model.
        n_layers: its blocks.
        parameters: how many weights.
        weights_gib: their memory, in the dtype that was asked for.
        cache_bytes: of the keys and values of one token in generation.
        workload: the work.
        max_tokens: token budget of a pass.
        table: a row per job: ``tokens`` that run forward through all blocks and ``tokens_back`` of them that keep a graph
            (token-layers divided by the number of blocks), ``unembedded`` positions, ``teraflop`` of the matrix products
            (attention's own scores left out), ``pass_rows`` and ``pass_length`` of the largest pass, and ``peak_gib``,
            weights included.

    Examples:
        >>> plan_run("tiny", Workload(records=1), jobs=["caa"]).n_layers     # doctest: +SKIP
        2
    """

    name: str
    n_layers: int
    parameters: int
    weights_gib: float
    cache_bytes: int
    workload: Workload
    max_tokens: int
    table: pd.DataFrame

    @override
    def __str__(self) -> str:
        w = self.workload
        image = f" and {w.image_tokens} image tokens" if w.image_tokens else ""
        rows = self.table.to_string(index=False, float_format=lambda x: f"{x:,.2f}")
        return (
            f"{self.name}: {self.parameters / 1e9:,.2f} billion weights, {self.weights_gib:,.1f} GiB; "
            f"{self.n_layers} layers; {self.cache_bytes / 1024:,.0f} KiB of keys and values per token in generation\n"
            f"{w.records} records, prompts of {w.prompt_tokens} tokens{image}, responses of {w.response_tokens}; "
            f"{w.steps} steps; {self.max_tokens} tokens a pass\n{rows}"
        )

    __repr__ = __str__


def plan_run(
    shape: str | Path | Mapping[str, Any],
    workload: Workload | None = None,
    *,
    jobs: Sequence[str] = USUAL_JOBS,
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int = 4096,
) -> RunPlan:
    """Tokens, operations and peak memory of builds and a sweep on a model of which only the shape is needed.

    Args:
        shape: a known one (``"llama-3.1-8b"``, ``"llama-3.1-70b"``, ``"qwen2.5-vl-7b"``, ``"smollm2"``, ``"gemma3-270m"``,
            ``"qwen2.5-0.5b"``, ``"llava-1.6-7b"``), a ``config.json`` or its folder, or its contents.
        workload: how many records of what lengths; default 50 of 60 + 8 tokens.
        jobs: attribution methods (builds with the ``grains`` recipe), ``"margin_gradient"``, ``"caa"``, ``"sweep"`` over all
            layers.
        dtype: of the weights.
        max_tokens: token budget of one pass, as for ``build_vectors``; passes with gradients take half of it.

    Returns:
        The plan; ``print`` shows it, ``plan.table`` has the numbers.

    Raises:
        OptionError: an unknown shape, job or option, or an architecture that TransformerLens cannot wrap.

    Examples:
        >>> print(plan_run("llama-3.1-8b", Workload(records=100)))     # doctest: +SKIP
    """
    work = workload or Workload()
    unknown = [job for job in jobs if job not in ALL_JOBS]
    if unknown or isinstance(jobs, str):
        raise OptionError(f"jobs={unknown or jobs!r} are not known; expected a list of some of {', '.join(ALL_JOBS)}")
    config = shape_config(shape)
    _require_context(config, work)
    real = _made(config, "meta", dtype)
    n_layers = int(config.get_text_config().num_hidden_layers)
    depths = DEPTHS if n_layers > max(DEPTHS) else (n_layers,)
    stand_ins = [random_bridge(_made(narrow(config, depth), "cpu", torch.float32)) for depth in depths]
    several = [count_jobs(stand_in, work, jobs, max_tokens) for stand_in in stand_ins]
    counted = {job: _at_depth(n_layers, depths, [counts[job] for counts in several]) for job in jobs}
    rows = [{"job": job, **_figures(real, counts, job, work)} for job, counts in counted.items()]
    return RunPlan(
        name=str(shape) if isinstance(shape, (str, Path)) else str(config.model_type),
        n_layers=n_layers,
        parameters=sum(p.numel() for p in real.parameters()),
        weights_gib=weight_bytes(real) / GIB,
        cache_bytes=cache_bytes(config, 1, dtype),
        workload=work,
        max_tokens=max_tokens,
        table=pd.DataFrame(rows),
    )


def count_jobs(model: BridgeModel, workload: Workload, jobs: Sequence[str], max_tokens: int) -> dict[str, Operations]:
    """What the package runs on a model for each job of a workload, counted while it runs.

    Args:
        model: a bridge that can run; a narrow one gives the counts of a wide one.
        workload: what to do.
        jobs: names in ``ALL_JOBS``.
        max_tokens: token budget of a pass.
    """
    known = workload.jobs(model, model.original_model.config)
    found = {}
    runs_plain(model)  # looked into once per model, with a few tokens
    with settings(max_tokens=max_tokens, progress=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights converge to nothing
        for job in jobs:
            with count_operations(model) as counts:
                known[job]()
            found[job] = counts
    return found


def _at_depth(n_layers: int, depths: Sequence[int], counted: Sequence[Operations]) -> Operations:
    """Counts at one depth from those at others."""
    if len(depths) == 1:
        return counted[0]

    def at(name: str) -> int:
        """Lagrange's polynomial, in whole numbers."""
        total = Fraction(0)
        for own, counts in zip(depths, counted, strict=True):
            others = [other for other in depths if other != own]
            total += getattr(counts, name) * prod(Fraction(n_layers - other, own - other) for other in others)
        return round(total)

    return replace(
        counted[-1],
        forward=at("forward"),
        backward=at("backward"),
        unembedded=at("unembedded"),
        patches=at("patches"),
    )


def narrow(config: Any, n_layers: int) -> Any:
    """The configuration of a stand-in: the same architecture in the smallest width, with some of the layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, width = 2, 8
    sizes: dict[str, Any] = {
        "hidden_size": heads * width, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": width,
        "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": min(2048, int(text.vocab_size)),
        "query_pre_attn_scalar": width, "num_hidden_layers": n_layers, "initializer_range": 0.2,
    }  # fmt: skip
    for name, size in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, size)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:n_layers]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0))
    rope = getattr(text, "rope_parameters", None) or {}
    if isinstance(rope, dict) and "mrope_section" in rope:
        text.rope_parameters = {**rope, "mrope_section": [2, 1, 1]}
    tower = getattr(small, "vision_config", None)
    if tower is not None:
        _narrow_tower(small, tower, heads * width)
    return small


def _narrow_tower(config: Any, tower: Any, d_model: int) -> None:
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": d_model, "depth": 1}
    for name, size in sizes.items():
        if hasattr(tower, name):
            setattr(tower, name, size)
    if hasattr(tower, "fullatt_block_indexes"):
        tower.fullatt_block_indexes = [0]
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for number, name in enumerate(ids):
        setattr(config, name, 2047 - number)  # above the words of the prompts


def _made(config: Any, device: str, dtype: torch.dtype) -> Any:
    config._attn_implementation = "eager"
    try:
        return random_hugging_face(config, device=device, dtype=dtype)
    except MODEL_ERRORS as error:
        require_from_outside(error)
        raise OptionError(f"{config.model_type} is no language model that transformers makes: {error}") from error


def _require_context(config: Any, work: Workload) -> None:
    n_ctx = getattr(config.get_text_config(), "max_position_embeddings", None)
    if n_ctx is not None and work.longest > n_ctx:
        raise OptionError(f"records of {work.longest} tokens are longer than the model's context of {n_ctx}")


def _figures(real: Any, counts: Operations, job: str, work: Workload) -> dict[str, Any]:
    text, size = real.config.get_text_config(), real.dtype.itemsize
    n_layers = int(text.num_hidden_layers)
    kinds = {back: shape for back, shape in counts.largest.items() if shape[0]}
    passes = []
    for back, (rows, length) in kinds.items():
        unembedded = min(max(1, counts.most_unembedded.get(back, 0)), rows * length)
        passes.append(pass_bytes(real, rows, length, unembedded, gradient=back))
    rows, length = max(kinds.values(), key=lambda shape: shape[0] * shape[1])
    held = 0
    if job == "sweep":  # the residual stream of every layer, to go on from it
        held = n_layers * int(text.hidden_size) * size * rows * length
    elif METHODS[job].removes if job in METHODS else False:  # keys and values of the prompts that branches go on from
        prompts = min(work.records * work.prompt_tokens, max(current().max_tokens, work.prompt_tokens))
        held = cache_bytes(real.config, prompts, real.dtype)  # the rows' own last for one layer, before the logits
    return {
        "tokens": counts.forward / n_layers,
        "tokens_back": counts.backward / n_layers,
        "unembedded": counts.unembedded,
        "teraflop": floating_point_operations(real, counts) / 1e12,
        "pass_rows": rows,
        "pass_length": length,
        "peak_gib": (weight_bytes(real) + max(passes) + held) / GIB,
    }
