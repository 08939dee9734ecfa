"""What a set's figures come to, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grains_tl.evaluate.controls import RANDOM_TOKENS, SIGN_TUNED, Comparison


def verdict(
    found: Comparison,
    controls: Sequence[str],
    cost: dict[str, Any] | None,
    *,
    method: str,
    layer: int,
    alpha: float,
) -> str:
    """One line per question: better than random tokens, than each control, than CAA at the same cost?

    Args:
        found: the chosen vector beside its controls.
        controls: names of further controls, those of them that were drawn.
        cost: effects at one KL; ``None`` where they were not measured.
        method: the chosen attribution method.
        layer: the chosen layer.
        alpha: the step of the comparison.
    """

    def say(name: str) -> str:
        c = found.against[name]
        return (
            f"{_answer(c)}, {c['difference']:+.2f} nats (95 % interval {c['low']:+.2f} to "
            f"{c['high']:+.2f}; above {c['beaten']:.0f} of {c['n_draws']:.0f} draws)"
        )

    caa = found.table.set_index("vector")["effect"]["CAA"]
    lines = [
        f"attribution beats random tokens: {say(RANDOM_TOKENS)}",
        f"it beats random tokens with the sign tuned on the choosing split: {say(SIGN_TUNED)}",
        *(f"it beats {name}: {say(name)}" for name in controls if name in found.against),
        f"attribution by {method}, layer {layer}, alpha {alpha}; CAA at the same size: {caa:+.2f} nats",
    ]
    if cost is not None:
        lines.append(_at_equal_cost(cost, method))
    return "\n".join(lines)


def _answer(against: Mapping[str, float]) -> str:
    """Above a control: ``"yes"``, ``"no"`` (it is below) or ``"not shown"``."""
    if against["low"] > 0 and against["beaten"] >= 0.95 * against["n_draws"]:
        return "yes"
    return "no" if against["high"] < 0 else "not shown"


def headline(found: Comparison, cost: dict[str, Any] | None, *, method: str) -> str:
    """What was found in three short sentences: does it steer, is it better than chance, is CAA stronger?

    Args:
        found: the chosen vector beside its controls.
        cost: effects at one KL; ``None`` where they were not measured, and CAA is then compared at the same step.
        method: the chosen attribution method.
    """
    rows = found.table.set_index("vector")
    own, caa = rows.loc[method], float(rows["effect"]["CAA"])
    effect, low, high = (float(own[name]) for name in ("effect", "low", "high"))
    says = "The vector steers" if low > 0 else "The vector works backwards" if high < 0 else "Not shown that it steers"
    chance = found.against[RANDOM_TOKENS]
    above = f"{chance['difference']:+.2f} ({chance['low']:+.2f} to {chance['high']:+.2f})"
    shown = _answer(chance) == "yes"
    return " ".join(
        [
            f"{says}: {effect:+.2f} nats ({low:+.2f} to {high:+.2f}).",
            f"Over random tokens: {above}." if shown else f"Over random tokens: not shown, {above}.",
            _beside_caa(cost, method, caa, low, high),
        ]
    )


def _beside_caa(cost: dict[str, Any] | None, method: str, caa: float, low: float, high: float) -> str:
    rows = {} if cost is None else {row["vector"]: row for row in cost["at_kl"]}
    own = rows.get(method, {})
    if (
        own.get("effect") is not None
        and own.get("difference_low") is not None
        and own.get("difference_high") is not None
    ):
        word = (
            "weaker" if own["difference_low"] > 0 else "stronger" if own["difference_high"] < 0 else "about as strong"
        )
        return f"At equal KL CAA is {word}: {rows['CAA']['effect']:+.2f} against {own['effect']:+.2f}."
    word = "stronger" if caa > high else "weaker" if caa < low else "about as strong"
    return f"CAA is {word}: {caa:+.2f}."


def _at_equal_cost(cost: dict[str, Any], method: str) -> str:
    rows = {row["vector"]: row for row in cost["at_kl"]}
    own, caa = rows[method], rows["CAA"]
    if own["effect"] is None or own["difference_low"] is None:
        return f"at {cost['kl']:g} nats KL on neutral text: not reached with the alphas that were tried"
    better = "yes" if own["difference_low"] > 0 else "no" if own["difference_high"] < 0 else "not shown"
    return (
        f"better than CAA at its own best layer (layer {caa['layer']}), both at {cost['kl']:g} nats KL on neutral text: "
        f"{better}, {own['difference']:+.2f} nats ({own['difference_low']:+.2f} to {own['difference_high']:+.2f}; "
        f"{own['effect']:+.2f} against {caa['effect']:+.2f})"
    )
