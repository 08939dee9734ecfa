"""The paper's recipe (GrAInS, arXiv 2507.18043, sections 3.1 to 3.3), in four steps.

1. Attribute: score every prompt token by how much it pushes log p(chosen) - log p(rejected) up or down.
2. Select: take the ``top_k`` content tokens that push most towards chosen, and those that push most towards rejected.
3. Differences: run the prompt whole and without either set; what changes in the residual stream is d+ and d-.
4. Reduce: per layer, the mean over records of d+ - d- (or a singular vector, or the paper's PCA) is the direction.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from grains_tl._util.checks import finite, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.warn import warn_caller
from grains_tl.attribution.api import check_method, current_options
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.methods import METHODS, method_of
from grains_tl.attribution.removal_methods import LeaveOneOut
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, random_selection
from grains_tl.attribution.store import attribute_records, recorded_options
from grains_tl.attribution.top_k import TopK
from grains_tl.attribution.words import GroupBy
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.inference.objectives import Objective
from grains_tl.models.precision import autocast_dtype
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.differences import Differences, shared_differences, weighted_differences
from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.readout import Readout, check_readout
from grains_tl.vectors.recipes import Recipe
from grains_tl.vectors.reduce import Reduce, Side, check_reduction, reduce_vectors
from grains_tl.vectors.steering_vectors import SteeringVectors


@dataclass(frozen=True)
class Grains(Recipe):
    """Differences that the most influential tokens make in the residual stream (arXiv 2507.18043).

    Defaults differ from the paper where its choice measured worse: leave-one-out instead of integrated gradients, the mean
    embedding instead of the end-of-text token as mask, the mean instead of centred PCA, and the whole response instead of
    its last token.

    Attributes:
        method: how tokens are scored.
        top_k: how many are masked on each side.
        mask: what replaces a masked token or patch, in leave-one-out and in caching.
        reduce: ``"mean"``, ``"svd"`` or ``"pca"`` (see ``reduce_vectors``).
        side: ``"both"``, or ``"toward_chosen"`` alone (the paper's setting for vision-language models).
        readout: where the residual is read: ``"prompt_end"``, ``"response_end"``, ``"response_mean"``, or ``"attributed"``:
            at the selected tokens themselves, those of I+ for d+ and those of I- for d-.
        objective: how response tokens are combined.
        weighted: each record's d+ and d- count in proportion to the summed scores of the tokens that were masked.
        without_common: what masking any token does, the mean of d+ and d- over the records, is projected out of the vector.
        fisher: Fisher samples or their file: the vector is F_s^-1 of what it would be (see ``KLOptimal``).
        shrinkage: of F, above 0 and at most 1.
        random: a seed: as many content tokens as attribution selects, drawn at random. The control that says whether
            attribution matters, with every other option as it is (``weighted`` then takes the drawn tokens' scores).

    Examples:
        >>> Grains(top_k=TopK(4), reduce="svd").method
        LeaveOneOut(group_by=None)
    """

    any_site: ClassVar[bool] = True
    method: Method = LeaveOneOut()
    top_k: TopK = TopK()
    mask: Mask = Mask()
    reduce: Reduce = "mean"
    side: Side = "both"
    readout: Readout = "prompt_end"
    objective: Objective = "sum"
    weighted: bool = False
    without_common: bool = False
    fisher: Fisher | str | Path | None = None
    shrinkage: float | int = 0.5
    random: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The recipe's name, and whether its tokens are drawn."""
        return "grains" if self.random is None else "grains, random tokens"

    def __post_init__(self) -> None:
        for name in ("weighted", "without_common"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}; expected True or False")
        if not 0 < finite("shrinkage", self.shrinkage) <= 1:
            raise OptionError(f"shrinkage={self.shrinkage}; expected above 0 and at most 1")
        if self.random is not None:
            whole("random", self.random, 0)

    @classmethod
    def of(
        cls,
        *,
        method: Method | str = "leave_one_out",
        top_k: TopK | int = 2,
        mask: Mask | Masker = "mean_embedding",
        top_k_image: int | None = None,
        group_by: GroupBy | None = None,
        spare_end: bool | None = None,
        **given: Any,
    ) -> Grains:
        """The recipe from names and numbers: what is no field of the recipe is one of the method."""
        given, mask = current_options(given, mask)
        own = {f.name: given.pop(f.name) for f in fields(cls) if f.name in given}
        chosen = TopK.of(top_k)
        if (top_k_image, group_by, spare_end) != (None, None, None):
            image_k = chosen.image if top_k_image is None else top_k_image
            chosen = TopK(
                chosen.k, image_k, group_by or chosen.group_by, chosen.spare_end if spare_end is None else spare_end
            )
        _refuse_misspelt(given, {*inspect.signature(cls.of).parameters, *(f.name for f in fields(cls))})
        way = method_of(method, **given)
        if chosen.group_by is not None and way.removes and getattr(way, "group_by", None) is None:
            way = replace(way, group_by=chosen.group_by)  # type: ignore[call-arg]  # whole groups go: fewer passes
        return cls(way, chosen, mask, **own)

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse what cannot work on these records and this model (ValueError)."""
        check_method(records.model, self.method, self.objective, self.mask)
        check_reduction(self.reduce, self.side, len(records.tokenized))
        check_readout(self.readout)
        if self.fisher is not None:
            residual_stream_only("grains with fisher=", records.site)
        self.top_k.check(records.tokenized)
        self._samples(records)

    @override
    def texts_used(self, records: BuildingRecords) -> frozenset[str]:
        samples = self._samples(records)
        return frozenset() if samples is None else frozenset(samples.info.get("texts", ()))

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        """The four steps at the top of this file."""
        attributions = self.attribute(records)
        selections = self.select(attributions)
        if self.readout == "prompt_end":
            _warn_of_masked_ends(attributions, selections)
        differences = self.differences(records, selections, attributions)
        return self.reduced(records, differences, attributions)

    def attribute(self, records: BuildingRecords) -> list[Attribution]:
        """Step 1: one attribution per record, from the checkpoint where it has them."""
        mine = attribute_records(
            records.model,
            [records.tokenized[i] for i in records.processes.share(len(records.tokenized))],
            self.method,
            objective=self.objective,
            mask=self.mask,
            checkpoint=records.checkpoint,
            processes=records.processes,
        )
        attributions = records.processes.gather_shares(mine)
        if self.method.completes:
            _warn_of_gaps(attributions, self.method.name)
        return attributions

    def select(self, attributions: Sequence[Attribution]) -> list[Selection]:
        """Step 2: which tokens are masked on each side, per record."""
        selections = [self.top_k.select(a) for a in attributions]
        if self.random is None:
            return selections
        generator = torch.Generator().manual_seed(self.random)
        return [
            random_selection(a.content.tolist(), s, generator, a.is_image.tolist())
            for a, s in zip(attributions, selections, strict=True)
        ]

    def differences(
        self,
        records: BuildingRecords,
        selections: Sequence[Selection],
        attributions: Sequence[Attribution] | None = None,
    ) -> Differences:
        """Step 3: d+ and d- of every record at every layer (sums of them where only the mean is wanted)."""
        found = shared_differences(
            records.model,
            records.tokenized,
            selections,
            processes=records.processes,
            mean_only=self.reduce == "mean" and not self.weighted,
            layers=records.layers,
            mask=self.mask,
            readout=self.readout,
            site=records.site,
        )
        return weighted_differences(found, selections, attributions) if self.weighted and attributions else found

    def reduced(
        self, records: BuildingRecords, differences: Differences, attributions: Sequence[Attribution]
    ) -> SteeringVectors:
        """Step 4: one direction per layer, with a manifest of how it was made."""
        settings = {
            **recorded_options(self.method, self.objective, self.mask, records.tokenized),
            "top_k": self.top_k.k,
            "top_k_image": self.top_k.image,
            "group_by": self.top_k.group_by,
            "spare_end": self.top_k.spare_end,
            "reduce": self.reduce,
            "side": self.side,
            "readout": self.readout,
            "autocast": autocast_dtype(records.model),
            "seed": getattr(self.method, "seed", None),
        }
        settings |= self._variant()
        samples = self._samples(records)
        if samples is not None:
            settings["fisher"] = {k: v for k, v in samples.info.items() if k != "model"}
        info = manifest(records.model, records.tokenized, settings, attributions)
        vectors = reduce_vectors(differences, reduce=self.reduce, side=self.side, info=info)
        if not self.without_common and samples is None:
            return vectors
        raw = vectors.raw
        if self.without_common:
            common = (differences.toward_chosen + differences.toward_rejected).mean(0)
            unit = common / common.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            raw = raw - (raw * unit).sum(-1, keepdim=True) * unit
        if samples is not None:
            raw = samples.solve(raw, self.shrinkage).float()
        return SteeringVectors.from_raw(raw, vectors.layers, vectors.resid_norms, info, site=vectors.site)

    def about_tokens(self) -> dict[str, Any]:
        """Which tokens are selected, for a manifest."""
        return {**self.method.options(), "top_k": self.top_k.k, "masker": self.mask.text, "random": self.random}

    def _variant(self) -> dict[str, Any]:
        """Options that differ from the paper's recipe; manifests of that one stay what they were."""
        names = {"weighted": False, "without_common": False, "random": None}
        own = {name: getattr(self, name) for name, usual in names.items() if getattr(self, name) != usual}
        return {**own, **({} if self.fisher is None else {"shrinkage": float(self.shrinkage)})}

    def _samples(self, records: BuildingRecords) -> Fisher | None:
        if self.fisher is None:
            return None
        if not isinstance(self.fisher, Fisher) and not Path(self.fisher).exists():
            raise OptionError(
                f"fisher={str(self.fisher)!r} does not exist; estimate the samples first: "
                "build_vectors(..., recipe='kl_optimal', fisher=path), or Fisher.estimate(...).save(path)"
            )
        samples = self.fisher if isinstance(self.fisher, Fisher) else Fisher.load(self.fisher)
        samples.require_match(records.model)
        return samples.at(records.layers)


def _warn_of_masked_ends(attributions: Sequence[Attribution], selections: Sequence[Selection]) -> None:
    """Say so when most records mask the very token they are read at: the vector then describes the mask."""
    masked = [
        len(a.content) - 1 in (*s.toward_chosen, *s.toward_rejected)
        for a, s in zip(attributions, selections, strict=True)
    ]
    if sum(masked) > len(masked) / 2:
        warn_caller(
            f"{sum(masked)} of {len(masked)} records mask the prompt's last token, where readout='prompt_end' reads the "
            "residual: the vector then holds mostly what the mask does there. Keep that token with spare_end=True, or read "
            "elsewhere, readout='response_mean' for instance",
        )


def _warn_of_gaps(attributions: Sequence[Attribution], method: str) -> None:
    """Say so when a path method did not keep its promise: the choice of tokens then rests on wrong numbers."""
    converged = [a.converged for a in attributions if a.converged is not None]
    if converged and not all(converged):
        warn_caller(
            f"{converged.count(False)} of {len(converged)} records: the {method} scores miss completeness by 5 % of "
            "|f(x) - f(x')| or more, so they do not add up to what they should explain. Use more n_steps, nodes='adaptive' "
            "or another reference, or a method without a path (leave_one_out)",
        )


def _refuse_misspelt(given: Mapping[str, Any], options: Collection[str]) -> None:
    """Say which option was meant, before the method refuses what it does not have."""
    known = {name for kind in METHODS.values() for name in kind.field_names()}
    for name in sorted(set(given) - known):
        close = difflib.get_close_matches(name, {*options, *known} - {"given"}, 1, 0.75)
        if close:
            raise OptionError(f"recipe 'grains' takes no {name}; did you mean {close[0]}?")
