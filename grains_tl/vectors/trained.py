"""Vectors that are optimised on the building records, at a fixed KL on neutral text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of
from grains_tl._util.progress import progress_bar
from grains_tl._util.rows import TensorRows
from grains_tl.attribution.field import graph_tokens
from grains_tl.attribution.store import image_key
from grains_tl.hooks.steer import Positions
from grains_tl.inference.objectives import Objective
from grains_tl.models.identity import model_identity
from grains_tl.models.precision import autocast_dtype
from grains_tl.models.state import autograd
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.gradients import MarginGradient
from grains_tl.vectors.kl_optimal import KLOptimal, held_out_shrinkage, neutral_rows
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.recipes import Recipe
from grains_tl.vectors.shrunken import ShrunkenInverse
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.training import LayerTraining, State, groups_of
from grains_tl.vectors.training_passes import TrainingLoss, record_passes, text_passes
from grains_tl.vectors.zero_steps import StepOperator, check_step


@dataclass(frozen=True)
class Trained(Recipe):
    """A vector optimised at each layer, under the steering it will be used with.

    The model's weights stay as they are. Each layer is trained by itself, from residuals that are cached there; a step
    takes ``batch_size`` records and a few neutral texts through the blocks above, forward and back. The weight of the KL
    is set at every step so that the KL stays near ``kl``. The vector's length is trained too: ``vectors.steering(1,
    layer, operator=..., scale="raw")`` takes the step that was trained.

    Attributes:
        loss: ``"margin"``: -log sigmoid(0.1 x change of the margin), as BiPO (arXiv 2406.00045); ``"reps"``: chosen against
            rejected per token without the unsteered model, as RePS (arXiv 2505.20809; ``objective`` does not matter);
            ``"likelihood"``: -log p(chosen), as one-shot optimised vectors (arXiv 2502.18862).
        kl: budget, nats per token of neutral text; choose what the vector will be steered at.
        scope: where the vector acts (see ``MarginGradient``); choose what it will be steered with.
        operator: ``"add_renorm"``, which steering does by default, or ``"add"``.
        objective: how response tokens are combined.
        bidirectional: train +v towards chosen and -v towards rejected, each record in turn.
        n_steps: optimiser steps at most.
        learning_rate: the first step, as a share of the vector's length; it falls to 0.
        batch_size: records of a step.
        held_out: share of the records and texts that decide when to stop and which step was best; 0 for none.
        texts: neutral texts. ``None``: the last 18 of the 30 bundled ones; measure the KL on ``neutral_texts(12)`` then.
        fisher: Fisher samples (or their file, as for ``KLOptimal``): training then starts at F^-1 g and moves in
            coordinates in which all directions cost the same, which takes fewer steps where some cost far more than
            others.
        seed: of the split, of the order of records, and of Fisher samples.

    Raises:
        OptionError: an option that cannot be used.

    Examples:
        >>> Trained(loss="reps").operator
        'add_renorm'
        >>> build_vectors(model, pairs, recipe="trained", layers=[18], checkpoint="training.jsonl")     # doctest: +SKIP
    """

    name: ClassVar[str] = "trained"
    loss: TrainingLoss = "margin"
    kl: float | int = 0.1
    scope: Positions = "all"
    operator: StepOperator = "add_renorm"
    objective: Objective = "sum"
    bidirectional: bool = True
    n_steps: int = 60
    learning_rate: float | int = 0.1
    batch_size: int = 4
    held_out: float | int = 0.25
    texts: tuple[str, ...] | list[str] | None = None
    fisher: Fisher | str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_step(self.scope, self.operator)
        if self.loss not in get_args(TrainingLoss):
            raise OptionError(f"loss={self.loss!r}; expected one of {', '.join(get_args(TrainingLoss))}")
        if not isinstance(self.bidirectional, bool):
            raise OptionError(f"bidirectional={self.bidirectional!r}; expected True or False")
        if not finite("kl", self.kl) > 0:
            raise OptionError(f"kl={self.kl}; expected a budget above 0 nats per token, such as 0.1")
        if not 0 < finite("learning_rate", self.learning_rate) <= 1:
            raise OptionError(f"learning_rate={self.learning_rate}; expected a share of the vector above 0, at most 1")
        if not 0 <= finite("held_out", self.held_out) < 1:
            raise OptionError(f"held_out={self.held_out}; expected a share of the records, at least 0 and below 1")
        for name, least in (("n_steps", 1), ("batch_size", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if self.texts is not None:
            object.__setattr__(self, "texts", tuple(listed("texts", self.texts)))
        _ = self._gradient  # which refuses an unknown objective

    @property
    def _gradient(self) -> MarginGradient:
        return MarginGradient(scope=self.scope, objective=self.objective, operator=self.operator)

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse records, texts or samples that cannot be used (ValueError)."""
        self._gradient.check(records)
        rows = neutral_rows(records.model, self.texts)
        for kind, given in (("prompts", [t.prompt for t in records.tokenized]), ("neutral texts", rows)):
            n = len(set(map(tuple, given)))
            if self.held_out and n < 2:
                raise OptionError(
                    f"{n} different {kind}: a share is held out to decide when to stop, so at least two are needed; give "
                    "more, or held_out=0"
                )
        if self.fisher is not None and (isinstance(self.fisher, Fisher) or Path(self.fisher).exists()):
            self._samples(records)

    @override
    def texts_used(self, records: BuildingRecords) -> frozenset[str]:
        return frozenset(hash_of(row) for row in neutral_rows(records.model, self.texts))

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        rows = neutral_rows(records.model, self.texts)
        mine = [records.layers[i] for i in records.processes.share(len(records.layers))]
        roots = self._roots(records)
        store = TensorRows.open(records.checkpoint, records.processes)
        bar = progress_bar(total=len(mine) * self.n_steps, desc="train", unit="step")
        # everything is made inside, because autograd refuses tensors made in the caller's inference mode
        with autograd(records.model), bar:
            own = []
            for layer in mine:
                training = self._training(records, rows, layer, roots)
                state = training.run(store, self._key(records, rows, layer, roots), bar)
                own.append((training.precondition(state.best), state))
        trained = records.processes.gather_shares(own)
        raw = torch.stack([v for v, _ in trained])
        info = manifest(records.model, records.tokenized, self._settings(records, rows, [s for _, s in trained]))
        return SteeringVectors.from_raw(raw, records.layers, records.resid_norms, info)

    def split(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Places of the records (or texts) to train on, and of those held out; equal prompts stay together."""
        different = list(dict.fromkeys(map(tuple, prompts)))
        n = len(different)
        order = random.Random(self.seed).sample(different, n)
        out = set(order[: min(max(1, round(self.held_out * n)), n - 1)]) if self.held_out else set()
        places = random.Random(self.seed).sample(range(len(prompts)), len(prompts))
        return [i for i in places if tuple(prompts[i]) not in out], [i for i in places if tuple(prompts[i]) in out]

    def _training(
        self, records: BuildingRecords, rows: Sequence[Sequence[int]], layer: int, roots: dict[int, _Root]
    ) -> LayerTraining:
        model, tokenized = records.model, records.tokenized
        lengths = [sum(map(len, t.inputs)) for t in tokenized]
        kept, held = self.split([t.prompt for t in tokenized])
        kept_texts, held_texts = self.split(rows)
        objective: Objective = "mean" if self.loss == "reps" else self.objective

        def of_records(indices: list[int]) -> Any:
            groups = list(groups_of(indices, lengths, self.batch_size, graph_tokens()))
            options: dict[str, Any] = {"scope": self.scope, "operator": self.operator, "objective": objective}
            return record_passes(model, tokenized, [layer], groups, **options)

        def of_texts(indices: list[int]) -> Any:
            own = [rows[i] for i in indices]
            return text_passes(model, own, [layer], scope=self.scope, operator=self.operator) if own else []

        return LayerTraining(
            layer=layer,
            records=of_records(kept),
            texts=of_texts(kept_texts),
            held_records=of_records(held),
            held_texts=of_texts(held_texts),
            loss=self.loss,
            budget=self.kl,
            bidirectional=self.bidirectional,
            n_steps=self.n_steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            precondition=roots.get(layer, _unchanged),
        )

    # -- preconditioning --

    def _samples(self, records: BuildingRecords) -> Fisher:
        # any F of this model and layers will do: it only chooses coordinates
        own = self.fisher
        if isinstance(own, (str, Path)) and Path(own).exists():
            own = Fisher.load(own)
        if isinstance(own, Fisher):
            own.require_match(records.model)
            return own.at(records.layers)
        return KLOptimal(self._gradient, texts=self.texts, fisher=own, seed=self.seed).estimate(records)

    def _roots(self, records: BuildingRecords) -> dict[int, _Root]:
        if self.fisher is None:
            return {}
        fisher, gradients = self._samples(records), self._gradient.per_record(records)
        shrinkage, _ = held_out_shrinkage(fisher, gradients, self._gradient)
        parts = zip(records.layers, shrinkage.tolist(), strict=True)
        return {layer: _Root(ShrunkenInverse.of(fisher.factor(layer)), s) for layer, s in parts}

    # -- what is written down --

    def _key(self, records: BuildingRecords, rows: Sequence[Sequence[int]], layer: int, roots: dict[int, _Root]) -> str:
        own = {**asdict(replace(self, fisher=None, texts=None)), "name": self.name}
        root = None if layer not in roots else roots[layer].digest
        made_of = [[t.prompt, t.chosen, t.rejected, *image_key(t)] for t in records.tokenized]
        autocast = autocast_dtype(records.model)
        return hash_of([model_identity(records.model), own, made_of, rows, layer, root, autocast])

    def _settings(
        self, records: BuildingRecords, rows: Sequence[Sequence[int]], states: Sequence[State]
    ) -> dict[str, Any]:
        return {
            "method": self.name,
            **asdict(replace(self, fisher=None, texts=None)),
            "magnitude_unit": "residual units: the length that was trained",
            "fisher": None if self.fisher is None else "preconditioned",
            "neutral_texts": [hash_of(list(row)) for row in rows],
            "stopped_at": [s.step for s in states],
            "best_step": [s.best_step for s in states],
            "held_out_effect": [s.best_effect if self.held_out else None for s in states],
            "history": [s.history for s in states],
            "autocast": autocast_dtype(records.model),
        }


@dataclass(frozen=True)
class _Root:
    """F_s^(-1/2), which makes every direction cost the same."""

    inverse: ShrunkenInverse
    shrinkage: float

    def __call__(self, vector: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
        return self.inverse.times(vector.detach(), self.shrinkage, 0.5).float()

    @property
    def digest(self) -> str:
        content = self.inverse.values.numpy().tobytes() + self.inverse.basis.numpy().tobytes()
        return hash_of([hashlib.sha256(content).hexdigest(), self.shrinkage])


def _unchanged(vector: Tensor) -> Tensor:
    return vector.detach().clone()
