"""What a gate does: how often it opens, what is left of the effect, what it saves where nothing is to be steered."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.checks import listed
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.costs import text_costs
from grains_tl.evaluate.records import record_effects
from grains_tl.hooks.gate_fitting import Prompts, listed_prompts, prompt_residuals
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.objectives import Objective
from grains_tl.records.pairs import PreferencePair
from grains_tl.types import HookedModel
from grains_tl.vectors.steering import Steering


def gate_report(
    model: HookedModel,
    steering: Steering,
    targets: Iterable[PreferencePair],
    neutral: Prompts,
    *,
    max_new_tokens: int = 20,
    objective: Objective = "sum",
    level: float = 0.95,
) -> pd.DataFrame:
    """A gated steering beside the same without its gate, on records to be steered and on prompts that are not.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: with a gate that reads a layer of its own (``ProbeGate``, ``CosineGate``, ``FunctionGate``).
        targets: records to be steered, none of those that the gate was fitted or calibrated on.
        neutral: prompts that are not to be steered, new ones too: texts, conversations or records.
        max_new_tokens: of the continuations along which the KL is taken.
        objective: how response tokens are combined.
        level: of the intervals.

    Returns:
        Two rows, ``gated`` False and True; each number has ``_low`` and ``_high``, Wilson's interval for shares of prompts,
        Student's t for means over records or prompts:

        - ``effect``: mean change of the margin over all targets, nats; ``effect_open`` over those that open the gate;
        - ``fires_targets``, ``fires_neutral``: share of prompts (for ``decide="token"`` of their tokens) that open it, 1
          without a gate;
        - ``kl_targets``, ``kl_neutral``: KL(steered || base) along continuations of the prompts, mean over generated
          tokens, nats per token;
        - ``n_open`` targets of ``n``, ``n_neutral`` neutral prompts.

    Raises:
        ValueError: a steering without such a gate, no targets, no neutral prompts.

    Examples:
        >>> report = gate_report(model, vectors.steering(0.2, 12, gate=gate), records, prompts)       # doctest: +SKIP
        >>> report[["gated", "effect", "fires_neutral", "kl_neutral"]]                              # doctest: +SKIP
    """
    if not isinstance(steering, Steering) or not isinstance(steering.gate, LayerGate):
        raise OptionError(
            "expected a steering with a gate that reads a layer: vectors.steering(alpha, layers, gate=ProbeGate.fit(...))"
        )
    records, others = listed("targets", targets), listed_prompts(neutral)
    if not records or not others:
        raise ValueError(f"{len(records)} targets and {len(others)} neutral prompts; give at least one of each")
    gate = steering.gate
    opened = {"targets": _opened(model, gate, records), "neutral": _opened(model, gate, others)}
    steps = [replace(steering, gate=None), steering]
    changes = record_effects(model, records, steps, objective=objective)["change"].to_numpy().reshape(2, -1)
    spent = {
        name: text_costs(model, steps, _continuations(prompts, max_new_tokens))["kl"].to_numpy().reshape(2, -1)
        for name, prompts in (("targets", records), ("neutral", others))
    }
    rows = []
    for gated, change in enumerate(changes):
        fires = {name: shares if gated else np.ones_like(shares) for name, shares in opened.items()}
        somewhere = fires["targets"] > 0
        row: dict[str, Any] = {"gated": bool(gated), **_named("effect", _mean(change, level))}
        row |= _named("effect_open", _mean(change[somewhere], level))
        for name, shares in fires.items():
            by_row = gate.decide == "prompt_end"
            row |= _named(f"fires_{name}", _wilson(shares, level) if by_row else _mean(shares, level))
            row |= _named(f"kl_{name}", _mean(spent[name][gated], level))
        rows.append({**row, "n_open": int(somewhere.sum()), "n": len(records), "n_neutral": len(others)})
    return pd.DataFrame(rows)


def _opened(model: HookedModel, gate: LayerGate, prompts: Prompts) -> NDArray[np.float64]:
    """``[prompt]`` share of its places at which the gate opens."""
    resid, counts, _ = prompt_residuals(model, prompts, gate.layer, gate.decide == "token")
    places = gate(resid[None])[0] if gate.decide == "token" else gate(resid)
    return np.array([float(part.float().mean()) for part in places.split(counts)])


def _continuations(prompts: Prompts, max_new_tokens: int) -> Continuations:
    given = listed_prompts(prompts)
    texts = [one.prompt if isinstance(one, PreferencePair) else one for one in given]
    images = [one.image if isinstance(one, PreferencePair) else None for one in given]
    return Continuations(texts, max_new_tokens, images=images if any(x is not None for x in images) else None)


def _named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _mean(values: NDArray[np.float64], level: float) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    mean, _, low, high = mean_interval(values, level)
    return mean, low, high


def _wilson(opened: NDArray[np.float64], level: float) -> tuple[float, float, float]:
    """Share of prompts, with Wilson's interval."""
    from scipy import stats

    n, share, z = len(opened), float(opened.mean()), float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return share, max(0.0, centre - reach), min(1.0, centre + reach)
