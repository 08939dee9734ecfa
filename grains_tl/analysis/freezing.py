"""What carries a steering effect: later parts of the model, frozen at what they were without steering.

1. Run the records without steering and keep, in every block after the steered one, what heads attend to (QK), what they
   move (OV), what the MLP writes, and what the norms divide by.
2. Run them steered with any of these four held at its kept value. With all four held only the step itself reaches the
   unembedding: the direct path, which is linear in the step.
3. The sixteen combinations give each kind's part of the effect (Shapley's value): with the direct path they add up to it.
   Frozen attention patterns alone are the question of arXiv 2604.08524.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl._util.progress import progress_bar
from grains_tl._util.stats import mean_interval
from grains_tl.analysis.equal_kl import with_random_directions
from grains_tl.analysis.holding import Frozen, held, keep_values
from grains_tl.analysis.runs import batch_runner
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.inference.logprobs import hooks_for, score_batches
from grains_tl.inference.objectives import Objective, require_objective
from grains_tl.models.running import require_hook_names, resid_post
from grains_tl.tokens.pairs import Records, TokenizedPair, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering

#: What is frozen or free, all later blocks together.
PARTS = ("norms", "QK", "OV", "MLP")

#: What mechanism takes apart.
Parts = Literal["all", "layer", "head"]

RANDOM = "random direction"


@torch.inference_mode(False)
def mechanism(
    model: HookedModel,
    steering: Steering,
    pairs: Records,
    *,
    by: Parts = "all",
    n_random: int = 3,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    objective: Objective = "sum",
) -> pd.DataFrame:
    """How a steering effect reaches the responses: directly, or through attention, MLPs and norms of later blocks.

    Freezing is exact: hooks put back the values of the run without steering. Beside the vector stand random directions
    that cost the same KL on neutral text, so that what any disturbance does can be told from what this one does.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: ``vectors.steering(alpha, layer)``.
        pairs: the records, tokenized or not.
        by: ``"all"``: kinds of parts over all later blocks (16 runs of the records); ``"layer"``: each kind in each block (2
            runs each); ``"head"``: each head (2 runs each).
        n_random: random directions; 0 for none.
        texts: neutral texts to match the KL on; default the first 12 bundled ones.
        seed: of the random directions.
        objective: how response tokens are combined.

    Returns:
        A row per vector (``"steering"`` and ``"random direction"``) and part, effects in nats, mean over records:

        * ``by="all"``: ``part`` is ``"direct"``, ``"norms"``, ``"QK"`` (changed attention patterns), ``"OV"`` (changed
          values), ``"MLP"`` and ``"total"``. ``effect`` of the five adds up to the total; ``alone``: what the part adds to
          the direct path by itself; ``lost``: what the whole effect loses if this part is frozen. Where ``alone`` and
          ``lost`` differ the parts act together.
        * ``by="layer"`` or ``"head"``: ``layer``, ``head``, ``part`` (of a head: ``"QK"``, or ``"head"`` for all that it
          writes), ``alone`` with everything else frozen, and ``lost``.

        ``low`` and ``high`` are the 95 % interval of ``effect`` (of ``lost`` by layer or head) over records, for random
        directions over draws; ``share`` is of the total, ``n`` counts records or draws, ``kl`` is nats per token.

    Raises:
        ValueError: steering at the last layer (nothing comes after it), no records, an unknown option.
        KeyError: a model without the hook points for patterns or values.

    Examples:
        >>> table = mechanism(model, vectors.steering(0.1, 18), pairs)                       # doctest: +SKIP
        >>> table[table.vector == "steering"][["part", "effect", "low", "high", "share"]]    # doctest: +SKIP
    """
    if by not in ("all", "layer", "head"):
        raise OptionError(f"by={by!r}; expected 'all', 'layer' or 'head'")
    n_random = whole("n_random", n_random, 0)
    nothing_after = "only the direct path is left"
    tokenized, after = later_blocks("mechanism", model, steering, pairs, objective, nothing_after)
    points = _points(model, after)
    steps, spent = with_random_directions(model, steering, n_random, texts, seed)
    plan = _plan(by, after, int(model.cfg.n_heads))
    effects = _run(model, tokenized, steps, plan, points, objective)
    groups = [("steering", slice(0, 1)), *([(RANDOM, slice(1, None))] if n_random else [])]
    rows = [_rows(by, after, int(model.cfg.n_heads), plan, effects[own], name, spent[own]) for name, own in groups]
    return pd.DataFrame([row for part in rows for row in part])


def later_blocks(
    caller: str, model: HookedModel, steering: Steering, pairs: Records, objective: Objective, nothing_after: str
) -> tuple[Sequence[TokenizedPair], range]:
    """The records and the blocks after the steered layer, with everything checked; ``nothing_after`` ends the message."""
    if not isinstance(steering, Steering):
        raise OptionError(f"steering is a {type(steering).__name__}; expected vectors.steering(alpha, layer)")
    residual_stream_only(caller, steering.vectors.site)
    require_objective(objective)
    tokenized = as_tokenized(model, pairs)
    if not tokenized:
        raise ValueError("no records; expected at least one")
    after = range(min(steering.layers) + 1, int(model.cfg.n_layers))
    if not after:
        raise ValueError(f"layer {min(steering.layers)} is the model's last, so that {nothing_after}")
    return tokenized, after


# -- what is run ------------------------------------------------------------------------------------------------------
def _plan(by: Parts, after: range, n_heads: int) -> list[Frozen]:
    """The sets that are frozen, in the order in which they are run; the first is nothing, the second everything."""
    everything = frozenset().union(*(_whole(part, after) for part in PARTS))
    sets: list[Frozen] = [frozenset(), everything]
    if by == "all":
        choices = itertools.chain.from_iterable(itertools.combinations(PARTS, n) for n in range(1, len(PARTS)))
        return sets + [frozenset().union(*(_whole(part, after) for part in chosen)) for chosen in choices]
    for site in _sites(by, after, n_heads):
        sets += [frozenset([site]), _but(everything, site, n_heads)]
    return sets


def _sites(by: Parts, after: range, n_heads: int) -> list[tuple[str, int, int]]:
    if by == "layer":
        return [(part, layer, -1) for layer in after for part in ("QK", "OV", "MLP")]
    return [(part, layer, head) for layer in after for head in range(n_heads) for part in ("QK", "head")]


def _but(everything: Frozen, site: tuple[str, int, int], n_heads: int) -> Frozen:
    """Everything frozen but one site; of a block with a free head, its other heads one by one."""
    part, layer, head = site
    if head < 0:
        return everything - {site}
    rest = everything - {("QK", layer, -1), ("OV", layer, -1)}
    if part == "QK":  # its pattern is free, all values stay
        patterns = {("QK", layer, other) for other in range(n_heads) if other != head}
        return rest | patterns | {("OV", layer, -1)}
    return rest | {("head", layer, other) for other in range(n_heads) if other != head}


def _points(model: HookedModel, after: range) -> dict[tuple[str, int], list[str]]:
    """Hook points of every part and block; KeyError where the model lacks them."""
    names = {
        (part, layer): [f"blocks.{layer}.{point}"]
        for layer in after
        for part, point in (
            ("QK", "attn.hook_pattern"),
            ("OV", "attn.hook_v"),
            ("head", "attn.hook_z"),
            ("MLP", "hook_mlp_out"),
        )
    }
    require_hook_names(model, [(name, id) for own in names.values() for name in own])
    known = list(model.hook_dict)
    for layer in after:
        start = f"blocks.{layer}.ln"
        names["norms", layer] = [name for name in known if name.startswith(start) and name.endswith(".hook_scale")]
    if "ln_final.hook_scale" in known:
        names["norms", after[-1]].append("ln_final.hook_scale")
    return names


def _run(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    steps: Sequence[Steering],
    plan: Sequence[Frozen],
    points: Mapping[tuple[str, int], list[str]],
    objective: Objective,
) -> Float[Tensor, "step set record"]:
    """Change of the margin by each step with each set frozen, nats."""
    effects = torch.zeros(len(steps), len(plan), len(tokenized))
    lowest = resid_post(min(steps[0].layers))
    with progress_bar(total=effects.numel(), desc="mechanism", unit="run") as bar, warnings.catch_warnings():
        # a held norm is computed in another order than the model's own: float round-off
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        for group, batch in score_batches(model, tokenized, objective):
            run = batch_runner(model, batch, [lowest])
            kept: dict[str, Tensor] = {}
            base = run(keep_values(points, kept))
            for i, step in enumerate(steps):
                own = hooks_for(step, batch)
                for j, frozen in enumerate(plan):
                    effects[i, j, group] = (run(own + held(frozen, points, kept)) - base).cpu()
                    bar.update(len(group))
    return effects


# -- tables -----------------------------------------------------------------------------------------------------------
def _rows(
    by: Parts,
    after: range,
    n_heads: int,
    plan: Sequence[Frozen],
    effects: Float[Tensor, "draw set record"],
    name: str,
    spent: NDArray[np.float64],
) -> list[dict[str, Any]]:
    """The table of one vector, or of several random ones together."""
    values = {frozen: effects[:, j].double().numpy() for j, frozen in enumerate(plan)}
    total, direct = values[plan[0]], values[plan[1]]
    about = {"vector": name, "kl": float(spent.mean())}
    if by == "all":
        shapley = _shapley(values, after)
        rows = [{**about, "part": "direct", **_numbers(direct, total)}]
        for part in PARTS:
            free = plan[1] - _whole(part, after)
            alone, lost = values[free] - direct, total - values[_whole(part, after)]
            more = {"alone": float(alone.mean()), "lost": float(lost.mean())}
            rows.append({**about, "part": part, **_numbers(shapley[part], total), **more})
        return [*rows, {**about, "part": "total", **_numbers(total, total)}]
    rows = []
    for i, (part, layer, head) in enumerate(_sites(by, after, n_heads)):
        frozen, free = plan[2 + 2 * i], plan[3 + 2 * i]
        where = {"layer": layer, **({"head": head} if by == "head" else {}), "part": part}
        numbers = _numbers(total - values[frozen], total)
        numbers["lost"] = numbers.pop("effect")
        rows.append({**about, **where, **numbers, "alone": float((values[free] - direct).mean())})
    return rows


def _whole(part: str, after: range) -> Frozen:
    return frozenset((part, layer, -1) for layer in after)


def _shapley(values: Mapping[Frozen, NDArray[Any]], after: range) -> dict[str, NDArray[Any]]:
    """Each part's mean gain over all orders in which the parts can be set free."""

    def of(free: frozenset[str]) -> NDArray[Any]:
        return values[frozenset().union(*(_whole(part, after) for part in PARTS if part not in free))]

    found = {}
    for part in PARTS:
        others = [p for p in PARTS if p != part]
        gains = []
        for n in range(len(PARTS)):
            weight = 1 / (len(PARTS) * math.comb(len(others), n))
            for chosen in itertools.combinations(others, n):
                free = frozenset(chosen)
                gains.append(weight * (of(free | {part}) - of(free)))
        found[part] = np.sum(gains, axis=0)
    return found


def _numbers(values: NDArray[Any], total: NDArray[Any]) -> dict[str, Any]:
    """Mean and interval: over records for one vector, over draws for several."""
    units = values[0] if len(values) == 1 else values.mean(1)
    mean, _, low, high = mean_interval(units)
    whole_effect = float(total.mean())
    share = mean / whole_effect if whole_effect else math.nan
    return {"effect": mean, "low": low, "high": high, "share": share, "n": len(units)}
