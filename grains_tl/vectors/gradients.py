"""The gradient of the preference itself as a steering vector: which small step raises the margin most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from grains_tl._util.errors import OptionError, numbered
from grains_tl._util.files import short_hash
from grains_tl._util.progress import progress_bar
from grains_tl._util.rows import TensorRows
from grains_tl._util.warn import warn_caller
from grains_tl.attribution.field import graph_tokens, require_finite, run_batches
from grains_tl.attribution.sharing import prompt_batches, shares_prompts
from grains_tl.attribution.store import image_key
from grains_tl.hooks.steer import Positions
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.inference.objectives import Objective, require_objective, token_weights
from grains_tl.models.identity import model_identity
from grains_tl.models.precision import autocast_dtype
from grains_tl.models.state import autograd, require_gradient, require_ready
from grains_tl.records.balance import unequal_answers
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.differences import Differences
from grains_tl.vectors.grains import Grains
from grains_tl.vectors.manifest import manifest
from grains_tl.vectors.recipes import Recipe
from grains_tl.vectors.reduce import first_singular
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.zero_steps import StepOperator, check_step, zero_steps

#: How the records' gradients become one: their mean, the median of each coordinate, or the first right singular vector of
#: the uncentred ``[record, d_model]`` matrix, signed like the mean.
GradientReduce = Literal["mean", "median", "svd"]


@dataclass(frozen=True)
class MarginGradient(Recipe):
    """The gradient of log p(chosen) - log p(rejected) with respect to a vector added to the residual stream.

    For each record, a vector v is added after block l (``blocks.{l}.hook_resid_post``, or another ``site`` of
    ``build_vectors``) at the positions in ``scope``; the recipe takes the gradient with respect to v at v = 0 and reduces it
    over the records. One forward and one backward pass per record serve all layers. Of all vectors of one (small) length,
    the mean gradient raises the mean margin of the building records most; it says nothing about what else changes
    (``KLOptimal`` weighs that).

    Attributes:
        scope: where the vector acts; choose what the vector will be steered with: ``"all"`` (every token, responses
            included), ``"prompt"``, ``"last"`` (from the prompt's last token on) or ``"generated"`` (after the prompt).
        reduce: ``"mean"``, ``"median"`` of each coordinate, or ``"svd"``.
        normalize: scale each record's gradient to length 1 first, so that no record dominates.
        objective: how response tokens are combined: ``"sum"``, ``"mean"`` or ``"single"``.
        operator: ``"add"``, or ``"add_renorm"``: without the part of v along the residual at each position, which scaling
            back to the old norm undoes.
        tokens: a ``Grains`` recipe that selects tokens of each prompt by attribution: the vector then acts at those alone
            (within ``scope``). ``Grains(random=0)`` draws as many at random, which says whether attribution matters.

    Raises:
        OptionError: an option that is none of these.

    Examples:
        >>> MarginGradient(scope="last").reduce
        'mean'
        >>> build_vectors(model, pairs, recipe="margin_gradient", layers=[12, 18])      # doctest: +SKIP
    """

    any_site: ClassVar[bool] = True
    scope: Positions = "all"
    reduce: GradientReduce = "mean"
    normalize: bool = False
    objective: Objective = "sum"
    operator: StepOperator = "add"
    tokens: Grains | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The recipe's name, and which tokens it looks at."""
        if self.tokens is None:
            return "margin_gradient"
        return f"margin_gradient at {'attributed' if self.tokens.random is None else 'random'} tokens"

    def __post_init__(self) -> None:
        check_step(self.scope, self.operator)
        if self.reduce not in get_args(GradientReduce):
            raise OptionError(f"reduce={self.reduce!r}; expected one of {', '.join(get_args(GradientReduce))}")
        if not isinstance(self.normalize, bool):
            raise OptionError(f"normalize={self.normalize!r}; expected True or False")
        require_objective(self.objective)
        if self.tokens is not None and self.scope == "generated":
            raise OptionError(
                "scope='generated' leaves the prompt alone, and tokens= are tokens of the prompt; use 'all'"
            )

    @override
    def check(self, records: BuildingRecords) -> None:
        """Refuse records on which the gradient does not exist or is zero by construction (ValueError)."""
        require_ready(records.model)
        with autograd(records.model):
            pass
        for number, t in enumerate(records.tokenized, start=1):
            with numbered("record", number):
                token_weights(t.chosen, t.rejected, self.objective)
        if self.scope == "generated" and all(t.longest == len(t.prompt) for t in records.tokenized):
            raise OptionError(
                "scope='generated' changes the tokens after the prompt, but every response is a single token, which is "
                "predicted before any of them: the gradient is zero. Use scope='last' or 'all', or longer responses"
            )
        if self.tokens is not None:
            self.tokens.check(records)
        warn_of_few_answers(records)

    def per_record(self, records: BuildingRecords) -> Float[Tensor, "record layer d_model"]:
        """Each record's gradient at each layer.

        Args:
            records: the building records.

        Returns:
            ``[record, layer, d_model]`` on the CPU in float32, nats per unit of the residual stream; neither normalized
            nor reduced. It takes 4 bytes per number: 50 records, 30 layers of width 576 are 3.5 MB.

        Raises:
            ValueError: a gradient is not finite, or the model's weights were made inside ``torch.inference_mode``.
        """
        model, layers = records.model, records.layers
        mine = [records.tokenized[i] for i in records.processes.share(len(records.tokenized))]
        chosen = self._selected(records)
        store = TensorRows.open(records.checkpoint, records.processes)
        keys = [self._key(records, t, own) for t, own in zip(mine, chosen, strict=True)]
        kept = [store.of_layers(key, layers) for key in keys]
        todo = [i for i, row in enumerate(kept) if row is None]
        # everything is made inside, because autograd refuses tensors made in the caller's inference mode
        with autograd(model), progress_bar(total=len(mine), desc="gradient", unit="record") as bar:
            bar.update(len(mine) - len(todo))
            for part, gradients in self._batches(records, [mine[i] for i in todo], [chosen[i] for i in todo]):
                for place, gradient in zip(part, gradients, strict=True):
                    store.keep_layers(keys[todo[place]], gradient, layers)
                    kept[todo[place]] = gradient
                bar.update(len(part))
        return torch.stack(records.processes.gather_shares([row for row in kept if row is not None]))

    def _selected(self, records: BuildingRecords) -> list[tuple[int, ...] | None]:
        """The prompt positions of each of this process's records at which the vector acts; ``None`` for all."""
        share = records.processes.share(len(records.tokenized))
        if self.tokens is None:
            return [None] * len(share)
        selections = self.tokens.select(self.tokens.attribute(records))
        return [tuple(sorted({*selections[i].toward_chosen, *selections[i].toward_rejected})) for i in share]

    def _batches(
        self,
        records: BuildingRecords,
        todo: Sequence[TokenizedPair],
        selected: Sequence[tuple[int, ...] | None],
    ) -> Iterator[tuple[list[int], Float[Tensor, "record layer width"]]]:
        """Places of the records of a batch, and their gradients."""
        if not todo:
            return
        model = records.model
        batches = prompt_batches if shares_prompts(model, todo, self.objective) else run_batches
        for part, batch in batches(model, todo, range(len(todo)), self.objective, graph_tokens()):
            only = None
            if self.tokens is not None:
                only = batch.scatter_prompt(
                    [[p in (selected[i] or ()) for p in range(len(todo[i].prompt))] for i in part]
                )
            how: dict[str, Any] = {"scope": self.scope, "operator": self.operator, "only": only, "site": records.site}
            leaves, hooks = zero_steps(batch, records.layers, records.width, **how)
            logprobs = batch_logprobs(model, batch, hooks)
            require_gradient(logprobs)
            grads = torch.autograd.grad((logprobs[:, 0] - logprobs[:, 1]).sum(), leaves)
            found = torch.stack([g.cpu() for g in grads], dim=1)
            require_finite(found, "the gradient")
            yield part, found

    def _key(self, records: BuildingRecords, pair: TokenizedPair, selected: tuple[int, ...] | None) -> str:
        """What a record's gradient depends on, besides the layers."""
        options: list[Any] = [self.scope, self.operator, self.objective, autocast_dtype(records.model)]
        options += [] if selected is None else [list(selected)]
        options += [] if records.site == "resid_post" else [records.site]
        ids = [pair.prompt, pair.chosen, pair.rejected, *image_key(pair)]
        return short_hash(["gradient", model_identity(records.model), options, ids])

    def differences(self, records: BuildingRecords) -> Differences:
        """Each record's contribution to the vector, as ``bootstrap_vectors`` and ``shuffle_labels`` take it.

        Their mean is the vector (with ``reduce="mean"``): resampling building records needs no further pass of the model.

        Args:
            records: the building records.

        Returns:
            ``toward_chosen``: the gradients, of length 1 with ``normalize``; ``toward_rejected``: zeros.
        """
        each = self.scaled(self.per_record(records)).float()
        return Differences(each, torch.zeros_like(each), records.layers, records.resid_norms, records.site)

    def reduced(self, gradients: Float[Tensor, "record layer d_model"]) -> Float[Tensor, "layer d_model"]:
        """One vector per layer from the records' gradients.

        Args:
            gradients: from ``per_record``, all records or some of them (for a bootstrap).

        Returns:
            ``[layer, d_model]``, nats per unit of the residual stream (of ``"svd"``: length 1).
        """
        each = self.scaled(gradients)
        mean = each.mean(0)
        if self.reduce == "mean":
            return mean.float()
        if self.reduce == "median":
            return each.quantile(0.5, dim=0).float()
        first = torch.stack([first_singular(matrix) for matrix in each.unbind(1)])
        return (first * torch.where((first * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)).float()

    def scaled(self, gradients: Float[Tensor, "record layer d_model"]) -> Float[Tensor, "record layer d_model"]:
        """The gradients in float64, of length 1 with ``normalize``."""
        each = gradients.double()
        return each / each.norm(dim=-1, keepdim=True).clamp(min=1e-30) if self.normalize else each

    @override
    def build(self, records: BuildingRecords) -> SteeringVectors:
        gradients = self.per_record(records)
        info = manifest(records.model, records.tokenized, self.settings(records, gradients))
        raw = self.reduced(gradients)
        return SteeringVectors.from_raw(raw, records.layers, records.resid_norms, info, site=records.site)

    def settings(self, records: BuildingRecords, gradients: Float[Tensor, "record layer d_model"]) -> dict[str, Any]:
        """What the manifest says: the options, and how much the records' gradients agree at each layer."""
        return {
            "method": self.name,
            **asdict(replace(self, tokens=None)),
            **({} if self.tokens is None else {"tokens": self.tokens.about_tokens()}),
            "magnitude_unit": "nats per unit of the residual stream",
            "mean_cosine": [round(c, 4) for c in mean_cosine(gradients).tolist()],
            "autocast": autocast_dtype(records.model),
            "seed": None,
        }


def mean_cosine(gradients: Float[Tensor, "record layer d_model"]) -> Float[Tensor, "layer"]:
    """Mean cosine between the gradients of two different records, per layer; NaN for a single record.

    Examples:
        >>> mean_cosine(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])).item()
        0.0
    """
    units = gradients.double() / gradients.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    n = len(units)
    own = (units * units).sum((0, 2))
    return ((units.sum(0) ** 2).sum(-1) - own).float() / (n * (n - 1) if n > 1 else float("nan"))


def warn_of_few_answers(records: BuildingRecords) -> None:
    """Say so when the gradient would learn which of a few answers is more often the chosen one.

    Warns:
        UserWarning: letters, or two to four different responses, some of which are chosen in some records and rejected in
            others, not equally often.
    """
    decode = records.model.tokenizer.decode
    chosen, rejected = ([decode(list(getattr(t, side))) for t in records.tokenized] for side in ("chosen", "rejected"))
    counts = unequal_answers(chosen, rejected)
    if counts:
        warn_caller(
            f"the responses are a few fixed answers in unequal numbers ({counts}): the vector will mostly push towards the "
            "one that is chosen more often. Counterbalance the records: load_pairs(..., balanced=True), in building and in "
            "test; or take the answers' words out of the vector with gr.vectors.without_words",
        )
