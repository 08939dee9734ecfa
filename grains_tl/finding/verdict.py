"""What a search came to: intervals, comparisons with the controls and between recipes, and sentences about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.stats import mean_interval, standard_error, t_reach, tails
from grains_tl.evaluate.reachable import with_share
from grains_tl.evaluate.summary import NO_EFFECT, STEERS, WRONG_WAY
from grains_tl.finding.measuring import Chosen, Run
from grains_tl.finding.records import Parts

#: By recipe and layer: ``[record]`` of a choice, ``[draw, record]`` of a control, nats.
Effects = Mapping[tuple[str, int], NDArray[np.float64]]

#: The margin moves, but not clearly further than under a control.
LIKE_CONTROL = "no more than a control"

COLUMNS = ["recipe", "layer", "alpha", "effect", "low", "high", "kl", "n", "verdict", "control", "n_draws"]
COLUMNS += ["above_control", "above_low", "above_high", "beaten"]


def joint_level(level: float, number: int) -> float:
    """At which level each of some intervals holds, so that all of them together do at the given one (Bonferroni)."""
    return 1 - (1 - level) / number


def with_verdicts(
    table: pd.DataFrame, effects: Effects, choices: Mapping[str, Chosen], run: Run, parts: Parts
) -> tuple[pd.DataFrame, str, str]:
    """The table with its statistics, the best recipe, and the sentences.

    Intervals of recipes hold for all recipes together (Bonferroni), so that trying more of them finds no more by chance.

    Returns:
        ``(table, name of the best recipe, verdict)``.
    """
    level = joint_level(run.level, len(choices))
    rows = [
        _control_row(r, effects, run.level) if r["control"] else _row(r, table, effects, level) for r in _rows(table)
    ]
    full = pd.DataFrame(rows).reindex(columns=COLUMNS).assign(control=lambda f: f["control"].astype(bool))
    stated = (
        [] if run.budget == "generated" else [c.vectors for c in choices.values()]
    )  # a ceiling per KL on neutral text
    full = with_share(full.assign(positions=run.positions), stated)
    full = full.drop(columns="positions")
    # the best first: those that steer before the others
    order = full.assign(steers=full["verdict"] == STEERS)
    full = full.loc[order.sort_values(["control", "steers", "effect"], ascending=[True, False, False]).index]
    full = full.reset_index(drop=True)
    own = full[~full["control"]]
    best, found = own.iloc[0], bool((own["verdict"] == STEERS).any())
    sentences = [
        *(_found(best, full, run) if found else _nothing(best, choices, run)),
        *_between(best, own, effects, level),
        *([] if full["control"].any() else ["No control was run: add 'random_direction' to recipes."]),
        *parts.notes,
    ]
    return full, str(best["recipe"]), "\n".join(sentences)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")


def _row(row: dict[str, Any], table: pd.DataFrame, effects: Effects, level: float) -> dict[str, Any]:
    """A choice: Student's t over the records, and its difference from the control that does most."""
    layer, change = row["layer"], effects[row["recipe"], row["layer"]]
    effect, _, low, high = mean_interval(change, level)
    found = {**row, "effect": effect, "low": low, "high": high, "n": len(change), "n_draws": 0}
    rivals = [r["recipe"] for r in _rows(table) if r["control"] and r["layer"] == layer]
    differences = [above(change, effects[name, layer], level) for name in rivals]
    if differences:
        nearest = min(differences, key=lambda d: d["above_low"])
        found |= {**nearest, "beaten": sum(d["beaten"] for d in differences)}
        found["n_draws"] = sum(len(effects[name, layer]) for name in rivals)
    if not low <= 0 <= high and effect > 0:
        found["verdict"] = STEERS if all(d["above_low"] > 0 for d in differences) else LIKE_CONTROL
    else:
        found["verdict"] = WRONG_WAY if high < 0 else NO_EFFECT
    return found


def _control_row(row: dict[str, Any], effects: Effects, level: float) -> dict[str, Any]:
    """A control: the mean over its draws, and between which values a share ``level`` of the draws lies."""
    draws = effects[row["recipe"], row["layer"]]
    means = draws.mean(1)
    low, high = np.quantile(means, tails(level))
    return {**row, "effect": means.mean(), "low": low, "high": high, "n": draws.shape[1], "verdict": ""}


def above(change: NDArray[np.float64], draws: NDArray[np.float64], level: float) -> dict[str, float]:
    """How far a vector lies above a control, record by record; the interval has the spread of records and of draws."""
    difference = change - draws.mean(0)
    means = draws.mean(1)
    se = float(np.hypot(standard_error(difference), standard_error(means)))
    reach = t_reach(se, min(len(change), len(means)), level)
    mean = float(difference.mean())
    beaten = int((means < change.mean()).sum())
    return {"above_control": mean, "above_low": mean - reach, "above_high": mean + reach, "beaten": beaten}


def _found(best: pd.Series, table: pd.DataFrame, run: Run) -> Iterator[str]:
    yield (
        f"{best['recipe']} steers: at layer {best['layer']} and alpha {best['alpha']:.3g} the margin of the {best['n']} "
        f"report records moves by {_nats(best)} nats, for a KL of {best['kl']:.3f} {run.kl_of}."
    )
    for _, control in table[table["control"] & (table["layer"] == best["layer"])].iterrows():
        yield (
            f"Control: {int(control['n_draws'])} draws of {control['recipe']} at the same layer and a KL of "
            f"{control['kl']:.3f} move it by {control['effect']:+.2f} on average ({control['low']:+.2f} to "
            f"{control['high']:+.2f})."
        )
    if best["n_draws"]:
        yield (
            f"{best['recipe']} lies above {int(best['beaten'])} of {int(best['n_draws'])} draws, and above the mean of the "
            f"strongest control by {best['above_control']:+.2f} ({best['above_low']:+.2f} to {best['above_high']:+.2f})."
        )


def _nothing(best: pd.Series, choices: Mapping[str, Chosen], run: Run) -> Iterator[str]:
    yield (
        f"Nothing steers within a KL of {run.kl:g} {run.kl_of}. The strongest is {best['recipe']}, at layer "
        f"{best['layer']} and alpha {best['alpha']:.3g}: {_nats(best)} nats on {best['n']} report records "
        f"({best['verdict']})."
    )
    effect, reach = best["effect"], best["high"] - best["effect"]
    chosen = choices[best["recipe"]].effect
    if best["verdict"] == LIKE_CONTROL:
        yield (
            "A control at the same layer and KL moves the margin about as far, so the direction adds nothing that can be "
            "shown: try other layers, or pairs that differ in less than their wording."
        )
    elif effect > 0 and reach < 4 * effect:
        need = int(np.ceil(best["n"] * (reach / effect) ** 2 * 1.3))
        yield (
            f"The interval is too wide for an effect of this size: about {need} report records instead of {best['n']} might "
            "show it."
        )
    elif chosen > 0:
        yield (
            f"On the choosing records the same setting moved it by {chosen:+.2f} nats, and that did not carry over: the "
            "pairs may have too little in common, or chosen and rejected may be mixed up in some. Read them, or give more."
        )
    else:
        yield (
            "It did not move the choosing records the right way either: check which side is chosen, and whether the pairs "
            "show one behaviour."
        )
    if best["kl"] < 0.8 * run.kl:
        yield f"The KL reached only {best['kl']:.3g} of the {run.kl:g} allowed: try larger alphas."
    else:
        yield (
            f"To go on, try a larger budget (kl={2 * run.kl:g}), other layers or other recipes, and report on records that "
            "were not in this search."
        )


def _between(best: pd.Series, own: pd.DataFrame, effects: Effects, level: float) -> Iterator[str]:
    """The best recipe against each other one, record by record."""
    mine = effects[best["recipe"], best["layer"]]
    for _, other in own[own["recipe"] != best["recipe"]].iterrows():
        mean, _, low, high = mean_interval(mine - effects[other["recipe"], other["layer"]], level)
        said = f"{other['recipe']} ({other['verdict']}: {_nats(other)}, layer {other['layer']})"
        if low > 0:
            yield f"{best['recipe']} moves it further than {said}, by {mean:+.2f} ({low:+.2f} to {high:+.2f})."
        elif high < 0:
            yield f"{best['recipe']} moves it less far than {said}, by {mean:+.2f} ({low:+.2f} to {high:+.2f})."
        else:
            yield f"No clear difference from {said}: {mean:+.2f} ({low:+.2f} to {high:+.2f})."


def _nats(row: pd.Series) -> str:
    return f"{row['effect']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
