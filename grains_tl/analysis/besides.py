"""What a steering does besides: other behaviours, knowledge, refusal of harmless prompts, and several steerings together.

1. Every steering is measured on every set: the change of the margin of each record (of a question, the log odds of its right
   answer), with a 95 % interval over the set's records.
2. Refusal of harmless prompts is a set too: the margin of a refusal against the beginning of an answer.
3. Where several are combined, each is measured alone and all together; the interaction is what the sum of the effects
   alone misses, paired by record.
4. Steerings that cost different KL cannot be compared: with ``kl`` each is first scaled to one price.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError, RecordError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.equal_kl import at_kl, kl_of
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import Setting
from grains_tl.records.loading import neutral_texts
from grains_tl.records.pairs import PreferencePair
from grains_tl.types import HookedModel, Text
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering

#: What the column of refusals is called.
REFUSAL = "refusal of harmless prompts"

#: Beginnings of a refusal and of an answer, compared after each harmless prompt.
REFUSES, ANSWERS = "I'm sorry, but I can't help with that.", "Sure, I can help with that."

#: Names of the rows that are about all steerings at once.
TOGETHER, INTERACTION = "together", "interaction"

#: Neutral texts on which the KL is measured.
N_TEXTS = 5

#: How far from the wanted KL a scaled steering may be, as a share of it.
KL_TOLERANCE = 0.2

AnySteering = Steering | CombinedSteering


def side_effects(
    model: HookedModel,
    steerings: Mapping[str, AnySteering],
    sets: Mapping[str, Iterable[Any]],
    *,
    harmless: Sequence[Text] | None = None,
    kl: float | None = None,
    together: bool = False,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """Each steering measured on every set of records, whatever it was made for.

    ``analysis.transfer`` builds vectors and compares them; this takes steerings as they are to be used, or with ``kl`` at
    one price.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steerings: by name; sums of several among them.
        sets: records or ``MultipleChoice`` questions by name; questions of knowledge show what is retained.
        harmless: prompts that deserve an answer, for a further column: by how much a refusal gains on an answer.
        kl: nats per token of neutral text; each steering is scaled to cost this much (its alpha is where the search
            begins). Default: as they are.
        together: also measure all at once, in the order given, and what that adds to their effects alone.
        checkpoint: a ``.jsonl`` file for finished measurements.

    Returns:
        One row per steering and set: ``built_on`` (the steering), ``measured_on``, ``effect`` (mean change of the margin,
        nats), ``low``, ``high`` (95 % interval over records), ``wrong_way`` (share of records whose margin fell),
        ``accuracy_change`` (of the likelier answer), ``alpha`` (NaN of sums), ``kl`` (nats per token of neutral text),
        ``n``.
        ``plotting.plot_transfer`` draws it. With ``together`` the rows ``"together"`` and ``"interaction"``, the effect
        together minus the sum of the effects alone, paired by record; and ``frame.attrs["cosines"]``, the cosine of each two
        steerings at each layer that both steer.

    Raises:
        ValueError: no steerings or sets, a set without records, a name that the table keeps, fewer than two steerings for
            ``together``, a ``kl`` that is not above 0, and with it a steering that does nothing; before anything runs. A
            steering that no scaling brings to ``kl`` (a gate that stays shut on neutral text), before the sets are measured.

    Examples:
        >>> table = side_effects(model, {"warm": warm}, {"warmth": pairs, "facts": questions})      # doctest: +SKIP
        >>> gr.plotting.plot_transfer(table)                                                        # doctest: +SKIP
    """
    given = _sets(sets, harmless)
    _require_steerings(steerings)
    if together:
        _combined(steerings)  # refuses too few of them, before a search for the KL
    alike = dict(steerings) if kl is None else _scaled(model, steerings, kl)
    everything = {**alike, TOGETHER: _combined(alike)} if together else alike
    settings = [Setting.of(one, vector=name) for name, one in everything.items()]
    spent = [float(one) for one in kl_of(model, list(everything.values()), neutral_texts(N_TEXTS))]
    rows = []
    for name, records in given.items():
        frame = record_effects(model, records, settings, checkpoint=checkpoint)
        changes = []
        for vector, price in zip(everything, spent, strict=True):
            own = frame[frame["vector"] == vector]
            changes.append(own["change"].to_numpy(dtype=float))
            right = own["correct"].to_numpy(dtype=float) - own["base_correct"].to_numpy(dtype=float)
            about = {"wrong_way": float((changes[-1] < 0).mean()), "accuracy_change": float(right.mean())}
            about |= {"alpha": _alpha(everything[vector]), "kl": price}
            rows.append({"built_on": vector, "measured_on": name, **_effect(changes[-1]), **about, "n": len(own)})
        if together:
            missed = changes[-1] - np.sum(changes[:-1], axis=0)
            about = {"kl": spent[-1] - sum(spent[:-1]), "n": len(missed)}
            rows.append({"built_on": INTERACTION, "measured_on": name, **_effect(missed), **about})
    table = pd.DataFrame(rows)
    if together:
        table.attrs["cosines"] = _cosines(steerings)
    return table


def _combined(steerings: Mapping[str, AnySteering]) -> CombinedSteering:
    if len(steerings) < 2 or {TOGETHER, INTERACTION} & set(steerings):
        raise OptionError(
            f"steerings are {list(steerings)}; expected two names or more, other than {TOGETHER!r} and {INTERACTION!r}"
        )
    return CombinedSteering(tuple(part for one in steerings.values() for part in one.parts))


def _sets(sets: Mapping[str, Iterable[Any]], harmless: Sequence[Text] | None) -> dict[str, list[Any]]:
    if not isinstance(sets, Mapping) or not sets:
        raise OptionError("sets is a mapping from names to records: {'warmth': pairs, 'facts': questions}")
    given = {str(name): list(records) for name, records in sets.items()}
    if harmless is not None:
        if isinstance(harmless, str) or REFUSAL in given:
            raise OptionError(f"harmless is a list of prompts, and no set may be named {REFUSAL!r}")
        given[REFUSAL] = [_refusal(prompt) for prompt in harmless]
    for name, records in given.items():
        if not records:
            raise RecordError(f"set {name!r} has no records; give some, or leave it out")
    return given


def _refusal(prompt: Text) -> PreferencePair:
    space = " " if isinstance(prompt, str) and not prompt[-1:].isspace() else ""
    return PreferencePair(prompt, space + REFUSES, space + ANSWERS)


def _require_steerings(steerings: Mapping[str, AnySteering]) -> None:
    if not isinstance(steerings, Mapping) or not steerings:
        raise OptionError("steerings is a mapping from names to steerings: {'warm': vectors.steering(0.2, 12)}")
    wrong = [name for name, one in steerings.items() if not isinstance(one, (Steering, CombinedSteering))]
    if wrong:
        raise OptionError(f"{wrong} are no steerings; make one with vectors.steering(alpha, layers)")


def _scaled(model: HookedModel, steerings: Mapping[str, AnySteering], kl: float) -> dict[str, AnySteering]:
    """The steerings at the alphas at which each costs the KL."""
    if finite("kl", kl) <= 0:
        raise OptionError(
            f"kl={kl}; expected nats per token above 0, such as 0.05, or None for the steerings as they are"
        )
    idle = [name for name, one in steerings.items() if all(part.idle for part in one.parts)]
    if idle:
        raise OptionError(
            f"{idle} do nothing (alpha 0, or no direction), so no scaling makes them cost {kl}; leave them out"
        )
    found, spent = at_kl(model, list(steerings.values()), kl, neutral_texts(N_TEXTS))
    off = {
        name: float(price)
        for name, price in zip(steerings, spent, strict=True)
        if not abs(price - kl) <= KL_TOLERANCE * kl
    }
    if off:
        costs = ", ".join(f"{name!r} costs {price:.3g}" for name, price in off.items())
        raise OptionError(
            f"kl={kl} was not reached: {costs} nats per token of neutral text. Begin at an alpha that costs about as much; "
            "a gate that stays shut on neutral text costs nothing there: leave kl out, or measure without the gate"
        )
    return dict(zip(steerings, found, strict=True))


def _alpha(steering: AnySteering) -> float:
    return float(steering.parts[0].alpha) if len(steering.parts) == 1 else np.nan


def _effect(changes: NDArray[np.float64]) -> dict[str, float]:
    mean, _, low, high = mean_interval(changes)
    return {"effect": mean, "low": low, "high": high}


def _cosines(steerings: Mapping[str, AnySteering]) -> pd.DataFrame:
    rows = [
        {"first": a, "second": b, "layer": layer, "cosine": float(one.vectors[layer].cosine(other.vectors[layer])[0])}
        for (a, first), (b, second) in itertools.combinations(steerings.items(), 2)
        for one in first.parts
        for other in second.parts
        for layer in sorted(set(one.layers) & set(other.layers))
        if one.vectors.site == other.vectors.site
    ]
    return pd.DataFrame(rows, columns=["first", "second", "layer", "cosine"])
