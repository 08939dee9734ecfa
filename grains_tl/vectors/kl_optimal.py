"""The direction that moves the margin most for what it changes elsewhere: F^-1 g (arXiv 2605.17231)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError, numbered
from grains_tl._util.files import hash_of
from grains_tl.records.loading import COST_TEXTS, neutral_texts
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.types import HookedModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.gradients import MarginGradient
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.recipes import Recipe
from grains_tl.vectors.shrunken import ShrunkenInverse
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Shrinkages that are tried: ridges of 0.001 to 1000 mean eigenvalues in steps of half a decade, and no F at all.
SHRINKAGES = (*(10 ** (k / 2) / (1 + 10 ** (k / 2)) for k in range(-6, 7)), 1.0)

#: Shrinkages at which the manifest states the first-order ceiling beside that of the chosen one.
CEILINGS = (0.1, 0.5, 0.9)

#: Parts of the texts and records that are held out in turn.
FOLDS = 5


@dataclass(frozen=True)
class KLOptimal(Recipe):
    """F^-1 g: the margin's gradient, weighed by how much each direction changes the predictions on neutral text.

    g is the ``gradient`` recipe's vector and F the Fisher matrix of the next-token distribution with respect to a vector
    added at the same positions (see ``Fisher``). To first order, F^-1 g changes the margin most among all vectors with the
    same KL. F is shrunk towards a multiple of the identity. Without ``shrinkage``, each layer takes the one that does best
    on held-out data: v from four fifths of the texts (and of the records, if there are at least five), then the margin it
    gains on the other records for the KL it costs on the other texts, (g'v) / sqrt(v'Fv), averaged over the five parts.
    Times sqrt(2 KL), that is the effect to first order on records like the building ones
    (``vectors.info["predicted_effect_kl_0.05"]``).

    Attributes:
        gradient: which gradient; its ``scope`` and ``operator`` hold for F too.
        n_samples: samples for F, one backward pass of one text each.
        texts: neutral texts for F. ``None``: the last 18 of the 30 bundled ones and the building prompts; measure the KL on
            ``neutral_texts(12)`` then, because texts that went into F make the vector look cheaper than it is.
        shrinkage: above 0 and at most 1, or ``None`` to choose it.
        seed: of the samples.
        fisher: samples to use instead, or a file: read if it exists, else written.

    Raises:
        OptionError: an option that cannot be used.

    Examples:
        >>> KLOptimal(MarginGradient(scope="last"), shrinkage=0.5).shrinkage
        0.5
        >>> build_vectors(model, pairs, recipe="kl_optimal", layers=[18], fisher="fisher.safetensors")   # doctest: +SKIP
    """

    gradient: MarginGradient = MarginGradient()
    n_samples: int = 600
    texts: tuple[str, ...] | list[str] | None = None
    shrinkage: float | None = None
    seed: int = 0
    fisher: Fisher | str | Path | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The recipe's name, and which tokens its gradient looks at."""
        return self.gradient.name.replace("margin_gradient", "kl_optimal")

    def __post_init__(self) -> None:
        whole("n_samples", self.n_samples, 1)
        whole("seed", self.seed, 0)
        if not isinstance(self.gradient, MarginGradient):
            raise OptionError(f"gradient={self.gradient!r}; expected a MarginGradient")
        if self.shrinkage is not None and not 0 < finite("shrinkage", self.shrinkage) <= 1:
            raise OptionError(f"shrinkage={self.shrinkage}; expected above 0 and at most 1 (F alone is singular)")
        if self.texts is not None:
            object.__setattr__(self, "texts", tuple(listed("texts", self.texts)))

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse records, texts or samples that cannot be used (ValueError)."""
        self.gradient.check(records)
        given = self._given(records)
        n_texts = len(self._rows(records)) if given is None else len(given.n_tokens)
        if self.shrinkage is None and n_texts < 2:
            raise OptionError(
                f"{n_texts} neutral text: shrinkage is chosen on held-out texts, so at least two are needed; give more "
                "texts, or a shrinkage"
            )

    @override
    def texts_used(self, records: BuildingRecords) -> frozenset[str]:
        given = self._given(records)
        hashes = [hash_of(row) for row in self._rows(records)] if given is None else given.info.get("texts", ())
        return frozenset(hashes)

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        gradients = self.gradient.per_record(records)
        fisher = self.estimate(records)
        g = self.gradient.reduced(gradients)
        chosen, scores = self._shrinkage(fisher, gradients)
        raw = fisher.solve(g, chosen)
        settings = {
            **self.gradient.settings(records, gradients),
            "method": self.name,
            "magnitude_unit": "residual units: the step at which, to first order, margin minus KL is largest",
            "seed": self.seed,
            "shrinkage": chosen.tolist(),
            "shrinkage_chosen": "given" if scores is None else "on held-out texts and records",
            "held_out_gain": None if scores is None else dict(zip(map(str, SHRINKAGES), scores.tolist(), strict=True)),
            # held out, so not inflated by the noise of g and F; still to first order
            "predicted_effect_kl_0.05": None if scores is None else (0.1**0.5 * scores.amax(0)).tolist(),
            "linear_ceiling_kl_0.05": {
                "chosen": fisher.ceiling(g, 0.05, chosen).tolist(),
                **{f"{s:.3f}": fisher.ceiling(g, 0.05, s).tolist() for s in CEILINGS},
            },
            "fisher": {**{k: v for k, v in fisher.info.items() if k != "model"}, "n_samples": len(fisher.samples)},
            "fisher_texts": self._texts_in_words(records),
        }
        info = manifest(records.model, records.tokenized, settings)
        return SteeringVectors.from_raw(raw.float(), records.layers, records.resid_norms, info)

    def differences(self, records: BuildingRecords) -> Differences:
        """Each record's contribution to the vector: F_s^-1 times its gradient, with F and the shrinkage of all records.

        Their mean is the vector, so that resampling building records needs no further pass of the model; the shrinkage is
        not chosen anew.

        Args:
            records: the building records.

        Returns:
            As ``MarginGradient.differences``.
        """
        gradients, fisher = self.gradient.per_record(records), self.estimate(records)
        shrinkage, _ = self._shrinkage(fisher, gradients)
        each = torch.stack([fisher.solve(g, shrinkage) for g in self.gradient.scaled(gradients)]).float()
        return Differences(each, torch.zeros_like(each), records.layers, records.resid_norms)

    def _shrinkage(
        self, fisher: Fisher, gradients: Float[Tensor, "record layer d_model"]
    ) -> tuple[Float[Tensor, "layer"], Float[Tensor, "shrinkage layer"] | None]:
        if self.shrinkage is None:
            return held_out_shrinkage(fisher, gradients, self.gradient)
        return torch.full((len(fisher.layers),), float(self.shrinkage), dtype=torch.float64), None

    def estimate(self, records: BuildingRecords) -> Fisher:
        """The Fisher samples that this recipe uses: given ones, those of a file, or new ones (written to the file)."""
        given = self._given(records)
        if given is not None:
            return given
        fisher = Fisher.estimate(
            records.model,
            self._rows(records),
            layers=records.layers,
            n_samples=self.n_samples,
            scope=self.gradient.scope,
            operator=self.gradient.operator,
            seed=self.seed,
            checkpoint=self._sample_file(records),
        )
        if isinstance(self.fisher, (str, Path)):
            fisher.save(self.fisher)
        return fisher

    def _sample_file(self, records: BuildingRecords) -> Path | None:
        """Where unfinished samples are kept: nowhere if the finished ones have a file of their own."""
        if records.checkpoint is None or isinstance(self.fisher, (str, Path)):
            return None
        return records.processes.own_file(records.checkpoint)  # every process draws all samples

    def _given(self, records: BuildingRecords) -> Fisher | None:
        if self.fisher is None or (not isinstance(self.fisher, Fisher) and not Path(self.fisher).exists()):
            return None
        fisher = self.fisher if isinstance(self.fisher, Fisher) else Fisher.load(self.fisher)
        fisher.require_match(records.model)
        for name in ("scope", "operator"):
            own, theirs = getattr(self.gradient, name), fisher.info.get(name)
            if own != theirs:
                raise OptionError(
                    f"the Fisher samples have {name}={theirs!r}, the gradient {own!r}; use the same for both"
                )
        return fisher.at(records.layers)

    def _rows(self, records: BuildingRecords) -> list[list[int]]:
        rows = neutral_rows(records.model, self.texts)
        if self.texts is None:  # a prompt of one token predicts nothing; one with an image is no text
            prompts = [list(t.prompt) for t in records.tokenized if t.images is None and len(t.prompt) > 1]
            rows += [list(row) for row in dict.fromkeys(map(tuple, prompts))]
        return rows

    def _texts_in_words(self, records: BuildingRecords) -> str:
        if self.fisher is not None:
            return "those of the given Fisher samples"
        if self.texts is None:
            bundled = len(neutral_texts())
            return (
                f"bundled neutral texts {COST_TEXTS + 1} to {bundled} and the {len(records.tokenized)} building prompts"
            )
        return f"{len(self.texts)} texts of the caller"


def neutral_rows(model: HookedModel, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of neutral texts; ``None``: the bundled ones that are not for measuring costs.

    Raises:
        OptionError: no texts.
        RecordError: a text that cannot be used, by its number.
    """
    rows = []
    for number, text in enumerate(neutral_texts()[COST_TEXTS:] if texts is None else texts, start=1):
        with numbered("text", number):
            rows.append(prompt_ids(model, text))
            if len(rows[-1]) < 2:
                raise ValueError("it has fewer than two tokens, so nothing in it is predicted")
    if not rows:
        raise OptionError("no neutral texts; expected at least one")
    return rows


def held_out_shrinkage(
    fisher: Fisher, gradients: Float[Tensor, "record layer d_model"], recipe: MarginGradient
) -> tuple[Float[Tensor, "layer"], Float[Tensor, "shrinkage layer"]]:
    """The shrinkage of each layer that does best on held-out texts and records, and the gains of all that were tried."""
    scores = held_out_gain(fisher, gradients, recipe)
    return torch.tensor(SHRINKAGES, dtype=torch.float64)[scores.argmax(0)], scores


def held_out_gain(
    fisher: Fisher, gradients: Float[Tensor, "record layer d_model"], recipe: MarginGradient
) -> Float[Tensor, "shrinkage layer"]:
    """(g'v) / sqrt(v'Fv) with g and F from texts and records that v was not made from, per shrinkage in ``SHRINKAGES``.

    With fewer records than parts, g comes from all of them on both sides, and only the texts are held out.

    Args:
        fisher: samples from at least two texts.
        gradients: of every record.
        recipe: reduces them.

    Returns:
        ``[shrinkage, layer]``, the mean over the parts; times sqrt(2 KL) it is the effect to first order, nats.
    """
    n_texts, n_records = len(fisher.n_tokens), len(gradients)
    parts = min(FOLDS, n_texts)
    order = torch.randperm(n_texts, generator=torch.Generator().manual_seed(0)).tolist()
    total = torch.zeros(len(SHRINKAGES), len(fisher.layers), dtype=torch.float64)
    for part in range(parts):
        held = order[part::parts]
        kept, other = fisher.of_texts([t for t in range(n_texts) if t not in held]), fisher.of_texts(held)
        out = torch.arange(n_records) % parts == part
        inside, outside = (gradients[~out], gradients[out]) if n_records >= parts else (gradients, gradients)
        g, wanted = recipe.reduced(inside), outside.double().mean(0)
        for column, layer in enumerate(fisher.layers):
            inverse = ShrunkenInverse.of(kept.factor(layer))
            v = torch.stack([inverse.times(g[column], shrinkage) for shrinkage in SHRINKAGES])
            cost = (v @ other.factor(layer).T).square().sum(-1).sqrt()
            total[:, column] += (v @ wanted[column]) / cost.clamp(min=1e-30)
    return total / parts
