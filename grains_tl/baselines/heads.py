"""Inference-time intervention (arXiv 2306.03341): probes on attention heads, and steering at the heads they point out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.progress import progress_bar
from grains_tl.inference.batches import by_token_budget, image_inputs, pad_rows
from grains_tl.models.running import hooked, require_layers, run_blocks
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.readout import read_out
from grains_tl.vectors.steering_vectors import SteeringVectors

#: The step of a head: from the mean of rejected to the mean of chosen response ends, or the probe's weights.
HeadDirection = Literal["mean_shift", "probe"]


@dataclass(frozen=True)
class HeadVectors:
    """Directions at the outputs of some attention heads (``blocks.{l}.attn.hook_z``), best probe first.

    Attributes:
        heads: (layer, head) of each row.
        directions: ``[head, d_head]``, unit length; +alpha pushes towards chosen.
        sigmas: ``[head]`` standard deviation of the building records' activations along the direction, ITI's unit.
        writes: ``[head, d_model]`` what a unit step at the head adds to the attention output (direction times W_O); where no
            norm follows it, to the residual stream.
        resid_norm: typical residual norm after the highest steered layer, the unit of ``alpha``.
        accuracies: ``[head]`` cross-validated accuracy of the probe, records kept together.

    Examples:
        >>> found = head_vectors(model, pairs, n_heads=4)     # doctest: +SKIP
        >>> found.heads, found.directions.shape               # doctest: +SKIP
    """

    heads: tuple[tuple[int, int], ...]
    directions: Float[Tensor, "head d_head"]
    sigmas: Float[Tensor, "head"]
    writes: Float[Tensor, "head d_model"]
    resid_norm: float
    accuracies: Float[Tensor, "head"]

    def hooks(self, alpha: float, *, scale: Literal["residual", "sigma"] = "residual") -> FwdHooks:
        """Steering hooks for ``run_with_hooks``, ``score_pairs`` or ``generate``, one per layer.

        Args:
            alpha: with ``scale="residual"`` the length of all heads' pushes together, as a fraction of the typical
                residual norm: the step of ``SteeringVectors.hooks`` at the same alpha. With ``"sigma"`` the paper's:
                each head moves by alpha of its own standard deviations. Either way heads move in proportion to their
                sigma, and alpha 0 changes no bit.
            scale: unit of ``alpha``.

        Returns:
            ``(name, fn)`` pairs at ``hook_z``, one per layer.

        Raises:
            ValueError: an unknown scale, a non-finite alpha, or heads whose pushes cancel.
        """
        if scale not in ("residual", "sigma"):
            raise ValueError(f"scale={scale!r}; expected 'residual' or 'sigma'")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha}; expected a finite number")
        factor = alpha
        if scale == "residual":
            push = float((self.sigmas[:, None] * self.writes).sum(0).norm())
            if push == 0:
                raise ValueError(
                    "the pushes of the heads cancel: there is no residual step to scale; use scale='sigma'"
                )
            factor = alpha * self.resid_norm / push
        steps = self.directions * (factor * self.sigmas)[:, None]
        layers = sorted({layer for layer, _ in self.heads})
        return [
            (
                f"blocks.{layer}.attn.hook_z",
                _shift({h: steps[i] for i, (at, h) in enumerate(self.heads) if at == layer}),
            )
            for layer in layers
        ]

    def vectors(self, n_heads: int) -> SteeringVectors:
        """The same steps as vectors of ``site="z"``, to be swept, compared at equal KL and saved.

        ``vectors(n_heads).steering(alpha, layers, operator="add", scale="raw")`` at all their layers is
        ``hooks(alpha, scale="sigma")``.

        Args:
            n_heads: attention heads of a layer of the model.

        Returns:
            ``SteeringVectors``: of each layer the steered heads' directions times their sigmas, side by side; the residual
            norms are unknown (0), so ``scale="raw"`` is the only unit of ``alpha``.
        """
        layers = sorted({layer for layer, _ in self.heads})
        raw = torch.zeros(len(layers), n_heads, self.directions.shape[1])
        for row, (layer, head) in enumerate(self.heads):
            raw[layers.index(layer), head] = (self.directions[row] * self.sigmas[row]).float().cpu()
        info = {"method": "heads", "heads": [list(pair) for pair in self.heads]}
        return SteeringVectors.from_raw(raw.flatten(1), layers, torch.zeros(len(layers)), info, site="z")


def _shift(steps: dict[int, Tensor]) -> Any:
    moving = any(bool(step.any()) for step in steps.values())

    def hook_fn(act: Float[Tensor, "batch pos head d_head"], hook: Any) -> Float[Tensor, "batch pos head d_head"]:
        if not moving:
            return act
        shift = torch.zeros(act.shape[2:], device=act.device)
        for head, step in steps.items():
            shift[head] = step.to(act.device)
        return act + shift.to(act.dtype)

    return hook_fn


def head_vectors(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    layers: Sequence[int] | None = None,
    n_heads: int | None = None,
    direction: HeadDirection = "mean_shift",
    heads: Iterable[tuple[int, int]] | None = None,
) -> HeadVectors:
    """ITI directions from preference records (arXiv 2306.03341, section 3).

    On every head a logistic regression (scikit-learn's, as it comes) tells chosen from rejected by the head's output at
    the last response token; the heads with the best cross-validated accuracy are steered, along the shift of the
    means or the probe's weights. We differ in that all positions are steered, as with the package's other
    vectors, and that the folds keep both responses of a record together (a probe that has seen one knows the other).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pairs: the building records.
        layers: where to look for heads, default all.
        n_heads: how many heads to steer; default 5 % of those looked at, at least one (the paper: 48 of 1024).
        direction: ``"mean_shift"`` (the paper's best) or ``"probe"``.
        heads: (layer, head) of the heads to steer, in place of those with the best probes: for example those that carry an
            effect by activation patching, ``gr.analysis.patch(..., component="z", by="head")``.

    Returns:
        ``HeadVectors``: the chosen heads, their directions ``[head, d_head]`` of unit length, and accuracies.

    Raises:
        ValueError: before anything runs, for fewer than two records, unknown options, more heads than there are, heads that
            do not exist or are named twice, or ``heads`` beside ``layers`` or ``n_heads``.

    Examples:
        >>> heads = head_vectors(model, pairs, layers=range(8, 20))                    # doctest: +SKIP
        >>> score_pairs(model, tokenized, heads.hooks(alpha=0.2))                      # doctest: +SKIP
        >>> table = gr.analysis.patch(model, tokenized, steering, component="z", by="head")   # doctest: +SKIP
        >>> best = table.nlargest(8, "effect")[["layer", "head"]].itertuples(index=False)     # doctest: +SKIP
        >>> mediating = head_vectors(model, pairs, heads=best)                                # doctest: +SKIP
    """
    tokenized = tokenize_pairs(model, pairs)
    named = None if heads is None else _named_heads(model, heads, layers, n_heads)
    if named is not None:
        layers, n_heads = [layer for layer, _ in named], len(named)
    wanted = require_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    per_layer = int(model.cfg.n_heads)
    candidates = [(layer, head) for layer in wanted for head in range(per_layer)]
    if direction not in ("mean_shift", "probe"):
        raise ValueError(f"direction={direction!r}; expected 'mean_shift' or 'probe'")
    if len(tokenized) < 2:
        raise ValueError(f"probes need at least 2 records, {len(tokenized)} given")
    n_heads = max(1, round(0.05 * len(candidates))) if n_heads is None else n_heads
    if not 1 <= n_heads <= len(candidates):
        raise ValueError(f"n_heads={n_heads}; layers {wanted} have {len(candidates)} heads")

    every = read_out_heads(model, tokenized, layers=wanted)
    found = rearrange(every, "record response layer head d_head -> record response (layer head) d_head")
    probes = [_probe(found[:, :, i].double()) for i in progress_bar(range(len(candidates)), desc="probes", unit="head")]
    # stable: of equally good heads the lower ones
    best = sorted(range(len(candidates)), key=lambda i: -probes[i][0])[:n_heads]
    best = best if named is None else [candidates.index(head) for head in named]
    rows = [_direction(found[:, :, i], probes[i][1], direction, candidates[i]) for i in best]
    steered = tuple(candidates[i] for i in best)
    directions = torch.stack(rows)
    projected = (found[:, :, best] * directions).sum(-1)  # not a matrix product: autocast would round it
    along = rearrange(projected, "record response head -> (record response) head")
    norms: list[Tensor] = []
    read_out(model, tokenized, layers=[max(layer for layer, _ in steered)], norms=norms)
    return HeadVectors(
        heads=steered,
        directions=directions,
        sigmas=along.std(0, correction=0),
        writes=torch.stack(
            [
                (d[:, None] * output_weights(model, layer)[head]).sum(0)
                for d, (layer, head) in zip(rows, steered, strict=True)
            ]
        ),
        resid_norm=torch.cat(norms, dim=1).median().item(),
        accuracies=torch.tensor([probes[i][0] for i in best]),
    )


def _named_heads(
    model: HookedModel, heads: Iterable[tuple[int, int]], layers: Any, n_heads: int | None
) -> list[tuple[int, int]]:
    """Heads that a caller has chosen, as whole numbers; ValueError for what cannot be meant."""
    if layers is not None or n_heads is not None:
        raise ValueError("heads= names the heads to steer; leave layers and n_heads out")
    named = [(whole("layer", layer, 0), whole("head", head, 0)) for layer, head in heads]
    size = (int(model.cfg.n_layers), int(model.cfg.n_heads))
    bad = [pair for pair in named if pair[0] >= size[0] or pair[1] >= size[1]]
    if bad or not named or len(set(named)) < len(named):
        raise ValueError(
            f"heads={named}; expected different (layer, head) below {size}" + (f", not {bad}" if bad else "")
        )
    return named


def read_out_heads(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    *,
    layers: Sequence[int],
) -> Float[Tensor, "record 2 layer head d_head"]:
    """``hook_z`` at the last token of prompt + chosen (0) and prompt + rejected (1)."""
    wanted = require_layers(model, layers)
    rows = [t.prompt + response for t in tokenized for response in (t.chosen, t.rejected)]
    images = [t.images for t in tokenized for _ in range(2)]
    found: list[Tensor | None] = [None] * len(rows)
    with torch.no_grad():
        for group in by_token_budget([len(row) for row in rows]):
            ids, mask, offset = pad_rows(model, [rows[g] for g in group])
            inputs = image_inputs(model, [images[g] for g in group], ids, offset)
            last = torch.tensor([len(rows[g]) - 1 for g in group], device=ids.device)
            kept: list[Tensor] = []

            def keep(
                act: Float[Tensor, "batch pos head d_head"], hook: Any, last: Tensor = last, kept: list[Tensor] = kept
            ) -> None:
                kept.append(act.detach()[torch.arange(len(last), device=last.device), last].float().cpu())

            with hooked(model, [(f"blocks.{layer}.attn.hook_z", keep) for layer in wanted]):
                run_blocks(model, ids, mask, wanted[-1] + 1, inputs)
            for place, g in enumerate(group):
                found[g] = torch.stack([z[place] for z in kept])
    return torch.stack([f for f in found if f is not None]).unflatten(0, (len(tokenized), 2))


def output_weights(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of a layer on the CPU, float32: what each head's output adds to the attention output."""
    return model.blocks[layer].attn.W_O.detach().float().cpu()


def _probe(found: Float[Tensor, "record 2 d_head"]) -> tuple[float, Float[Tensor, "d_head"]]:
    """Cross-validated accuracy of a head's probe, and the weights of the one trained on all records."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    n = len(found)
    x = rearrange(found, "record response d_head -> (record response) d_head").numpy()
    y = torch.tensor([1, 0]).repeat(n).numpy()
    record = torch.arange(n).repeat_interleave(2).numpy()
    probe = LogisticRegression(max_iter=1000)
    accuracy = cross_val_score(probe, x, y, groups=record, cv=GroupKFold(min(5, n))).mean()
    return float(accuracy), torch.from_numpy(probe.fit(x, y).coef_[0]).float()


def _direction(
    found: Float[Tensor, "record 2 d_head"], weights: Float[Tensor, "d_head"], how: str, head: tuple[int, int]
) -> Float[Tensor, "d_head"]:
    raw = weights if how == "probe" else (found[:, 0] - found[:, 1]).mean(0)
    size = raw.norm()
    if not torch.isfinite(size) or size == 0:
        raise ValueError(
            f"head {head} has the same output for chosen and rejected: there is no direction to steer along"
        )
    return raw / size
