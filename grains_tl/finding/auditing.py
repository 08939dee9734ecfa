"""What somebody's vector does, beside controls and beside vectors built from the same records.

1. Split the records as a search does; nothing is built from them for the vector that is audited.
2. Search: the vector, the rivals and the controls, each at its own layer and alpha within the KL budget.
3. Look closer at the vector's choice: records that move the wrong way, other wordings, the text that it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from typing_extensions import override

from grains_tl._util import html
from grains_tl._util.errors import OptionError
from grains_tl._util.stats import mean_interval
from grains_tl.evaluate.quality import quality_table
from grains_tl.evaluate.records import record_effects
from grains_tl.evaluate.settings import grid
from grains_tl.evaluate.summary import STEERS
from grains_tl.finding.api import OPTIONS, find_vector, spread_over
from grains_tl.finding.records import split_for_search
from grains_tl.finding.result import Found, evidence_of, examples_of
from grains_tl.finding.verdict import joint_level
from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PairLike, plain_text
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.files import load_vectors
from grains_tl.vectors.foreign import with_resid_norms
from grains_tl.vectors.manifest import texts_used
from grains_tl.vectors.recipes import DirectRecipe, Recipe
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: What the audited vector is called in tables.
NAME = "audited"


@dataclass(frozen=True, eq=False)
class Given(DirectRecipe):
    """Vectors that are there already, as a recipe.

    Attributes:
        vectors: at the layers that are asked for.
    """

    name = NAME
    vectors: SteeringVectors | None = None

    @override
    def texts_used(self, records: BuildingRecords) -> frozenset[str]:
        return texts_used(self.vectors.info) if self.vectors is not None else frozenset()

    @override
    def raw(self, records: BuildingRecords, generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
        assert self.vectors is not None
        return self.vectors.at(list(records.layers)).directions.float()


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """The result of ``audit``.

    Attributes:
        vectors: what was audited, with the residual norms of the model.
        found: the search: ``table``, ``effects``, ``examples`` and ``plot()`` with every recipe and control.
        records: a row per report record: ``record`` (from 0), ``prompt``, ``change`` (of the margin, nats).
        wordings: a row per set of records: ``records``, ``effect``, ``low``, ``high`` (nats), ``n``. The first is the
            report part, the second the other wordings, where they were given.
        quality: continuations of report prompts, with ``repetition`` and ``distinct`` shares (``generation_quality``).
        verdict: does it steer, better than what, at what price: one sentence a line.

    Examples:
        >>> result = audit(model, "happy.gguf", "pairs.jsonl")          # doctest: +SKIP
        >>> print(result.verdict)                                       # doctest: +SKIP
        >>> result.steers                                               # doctest: +SKIP
        True
    """

    vectors: SteeringVectors
    found: Found
    records: pd.DataFrame
    wordings: pd.DataFrame
    quality: pd.DataFrame
    verdict: str

    @property
    def row(self) -> pd.Series:
        """The audited vector's row of ``found.table``."""
        return self.found.table[self.found.table["recipe"] == NAME].iloc[0]

    @property
    def steers(self) -> bool:
        """Whether it moves the report records' margin further than the controls do."""
        return bool(self.row["verdict"] == STEERS)

    @property
    def evidence(self) -> dict[str, Any]:
        """What was measured of the vector, as plain data, for ``vectors.push_to_hub(repo, evidence=result)``."""
        row, about = self.row, self.found.about
        steering = self.vectors.steering(float(row["alpha"]), int(row["layer"]), positions=about["positions"])
        return evidence_of(row, steering, float(about["level"]), self.verdict)

    @property
    def table(self) -> pd.DataFrame:
        """``found.table``: the vector, its rivals and the controls at equal KL."""
        return self.found.table

    def plot(self) -> Any:
        """The effects with their intervals, and the controls' draws; a matplotlib ``Figure``."""
        return self.found.plot()

    def __repr__(self) -> str:
        return f"Audit({self.verdict.splitlines()[0]})"

    def _repr_html_(self) -> str:
        first, *more = self.verdict.splitlines()
        wordings = [
            [html.text(r["records"]), *(html.signed(r[c]) for c in ("effect", "low", "high")), html.number(r["n"], "d")]
            for r in self.wordings.to_dict("records")
        ]
        heads = ["records", "effect", "low", "high", "n"]
        return html.frame(
            html.title(first),
            *(html.note(sentence) for sentence in more),
            *([html.table(heads, wordings, numbers=range(1, 5))] if len(wordings) > 1 else []),
            html.fold("the search", self.found._repr_html_()),
        )


def audit(
    model: HookedModel,
    vector: SteeringVectors | Steering | str | Path,
    pairs: Iterable[PairLike] | Mapping[str, Iterable[PairLike]],
    recipes: Sequence[Recipe | str] = ("caa", "margin_gradient", "random_direction", "orthogonal_direction"),
    kl: float = 0.05,
    *,
    layers: Sequence[int] | None = None,
    other_wordings: Iterable[PairLike] | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Audit:
    """Whether a vector steers, better than chance, better than what the same records give, and at what price.

    The vector may come from anywhere; it is judged on preference records of the behaviour that it is said to have. Its
    layer and alpha are chosen on some of them and reported on others, as those of the rivals are, all within one KL budget.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vector: ``SteeringVectors``, a file that ``load_vectors`` reads, or a ``Steering`` of one layer, which is judged at
            that layer.
        pairs: as for ``find_vector``.
        recipes: rivals, built from the build part, and controls.
        kl: the budget: KL(steered || base) on neutral text, nats per token.
        layers: which of the stored layers to try; default up to eight spread over them.
        other_wordings: more records of the same behaviour in other words, on which the choice is measured too.
        checkpoint: a ``.jsonl`` file for finished measurements; the same call goes on there.
        options: as for ``find_vector``.

    Returns:
        ``Audit``: ``verdict``, ``steers``, ``table``, ``records``, ``wordings``, ``quality``, ``plot()``.

    Raises:
        ValueError: before anything runs: a file that cannot be read, a vector of another model, a step at several layers or
            with another operator than ``"add_renorm"``, and what ``find_vector`` refuses.

    Examples:
        >>> print(audit(model, "happy.gguf", load_pairs("pairs.jsonl")).verdict)           # doctest: +SKIP
    """
    vectors, only = _vectors(model, vector)
    tried = only or _layers(vectors, layers)
    parts = split_for_search(pairs, options.get("seed", 0))
    others = None if other_wordings is None else preference_pairs(other_wordings)
    if others is not None and len(others) < 2:
        raise OptionError(f"{len(others)} records of other wordings; expected at least 2 for an interval")
    given = {**OPTIONS, **options}
    rivals: list[Recipe | str] = [recipes] if isinstance(recipes, (str, Recipe)) else list(recipes)
    found = find_vector(
        model,
        {name: getattr(parts, name) for name in parts.sizes},
        [Given(vectors=vectors), *rivals],
        kl,
        layers=tried,
        checkpoint=checkpoint,
        **options,
    )
    row = found.table[found.table["recipe"] == NAME].iloc[0]
    layer, alpha = int(row["layer"]), float(row["alpha"])
    change = found.effects[NAME, layer]
    steering = Steering(vectors.at([layer]), alpha, (layer,), positions=given["positions"])
    level = joint_level(float(found.about["level"]), int((~found.table["control"]).sum()))  # as in the table
    wordings = [_wording("report part", change, level)]
    if others is not None:
        setting = grid({"vector": vectors.at([layer])}, [layer], [alpha], positions=given["positions"])
        moved = record_effects(model, others, setting, objective=given["objective"])
        wordings.append(_wording("other wordings", moved["change"].to_numpy(), level))
    examples = found.examples  # those of the best recipe
    if found.table["recipe"][0] != NAME:
        examples = examples_of(model, parts.report, steering, given["n_examples"], given["max_new_tokens"])
    quality = quality_table(*([getattr(e, name) for e in examples] for name in ("prompt", "base", "steered")))
    table = pd.DataFrame(wordings)
    return Audit(
        vectors=vectors,
        found=found,
        records=pd.DataFrame(
            {
                "record": range(len(change)),
                "prompt": [plain_text(record.prompt) for record in parts.report],
                "change": change,
            }
        ),
        wordings=table,
        quality=quality,
        verdict="\n".join([*_sentences(found.table, row, change, table, quality), *parts.notes]),
    )


def _vectors(model: HookedModel, vector: SteeringVectors | Steering | str | Path) -> tuple[SteeringVectors, list[int]]:
    """Vectors that fit the model and know its residual norms, and the one layer of a ``Steering``."""
    only: list[int] = []
    if isinstance(vector, Steering):
        if len(vector.layers) > 1 or vector.operator != "add_renorm" or vector.gate is not None:
            raise OptionError(
                f"the steering is {vector.label}; expected one layer, operator 'add_renorm' and no gate. Audit its vectors "
                "instead: audit(model, steering.vectors, ...)"
            )
        only, vector = list(vector.layers), vector.vectors  # type: ignore[assignment]
    vectors = load_vectors(vector, model) if isinstance(vector, (str, Path)) else vector
    if not isinstance(vectors, SteeringVectors):
        raise OptionError(f"vector is a {type(vectors).__name__}; expected SteeringVectors, a Steering or a file")
    vectors.require_match(model)
    known = bool(((vectors.resid_norms > 0) | ~vectors.directions.any(-1)).all())
    return vectors if known else with_resid_norms(vectors, model), only


def _layers(vectors: SteeringVectors, layers: Sequence[int] | None) -> list[int]:
    """The layers to try: those named, or some spread over the stored ones that have a direction."""
    if layers is not None:
        return vectors.layer_list(layers)
    stored = sorted(layer for layer, row in zip(vectors.layers, vectors.directions, strict=True) if bool(row.any()))
    if not stored:
        raise OptionError("these vectors are all empty; there is no direction to audit")
    return spread_over(stored)


def _wording(name: str, change: NDArray[np.float64], level: float) -> dict[str, Any]:
    effect, _, low, high = mean_interval(change, level)
    return {"records": name, "effect": effect, "low": low, "high": high, "n": len(change)}


def _sentences(
    table: pd.DataFrame, row: pd.Series, change: NDArray[np.float64], wordings: pd.DataFrame, quality: pd.DataFrame
) -> Iterator[str]:
    where = f"at layer {row['layer']} and alpha {row['alpha']:.3g}"
    moved = f"{row['effect']:+.2f} nats ({row['low']:+.2f} to {row['high']:+.2f})"
    price = f"for a KL of {row['kl']:.3f} nats per token of neutral text"
    if row["verdict"] == STEERS:
        yield f"The vector steers: {where} the margin of {row['n']} report records moves by {moved}, {price}."
    else:
        yield f"The vector is not shown to steer ({row['verdict']}): {where} the margin moves by {moved}, {price}."
    if row["n_draws"]:
        yield (
            f"It lies above {int(row['beaten'])} of {int(row['n_draws'])} random draws at the same layer and KL, and above "
            f"the mean of the strongest control by {row['above_control']:+.2f} ({row['above_low']:+.2f} to "
            f"{row['above_high']:+.2f})."
        )
    else:
        yield "No control was run: add 'random_direction' to recipes."
    rivals = table[~table["control"] & (table["recipe"] != NAME)]
    said = [
        f"{r['recipe']} {r['effect']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f}, layer {r['layer']})"
        for r in rivals.to_dict("records")
    ]
    if said:
        yield f"Built from the same records and held to the same budget: {'; '.join(said)}."
    back = int((change < 0).sum())
    low, high = stats.binomtest(back, len(change)).proportion_ci(method="wilson")
    yield f"{back} of {len(change)} report records move the wrong way ({low:.0%} to {high:.0%})."
    for r in wordings[wordings["records"] != "report part"].to_dict("records"):
        yield f"On {r['n']} records in other words: {r['effect']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})."
    if len(quality):
        yield (
            f"In {len(quality)} continuations {int(quality['degenerate'].sum())} are degenerate with steering and "
            f"{int(quality['base_degenerate'].sum())} without; runs of three words that repeat: "
            f"{quality['repetition'].mean():.0%} against {quality['base_repetition'].mean():.0%}."
        )
