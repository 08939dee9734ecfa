"""Which input tokens cause the preference: integrated gradients, gradient x input, leave-one-out.

Everything runs on the unchanged model with hooks at one point, ``models.attribution_point(model)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from grains_tl.batches import Batch, by_token_budget, scoring_batch
from grains_tl.masking import Masker
from grains_tl.models import attribution_point
from grains_tl.objectives import Objective, require_objective, token_weights
from grains_tl.replacements import ImageMasker, Replacements, hide, prompt_embeddings, replacements
from grains_tl.scoring import MAX_TOKENS, batch_logprobs, score_pairs
from grains_tl.tokens import TokenizedPair, tokenize_pairs
from grains_tl.types import Attribution, FwdHooks, HookedModel, PreferencePair

Method = Literal["integrated_gradients", "gradient_x_input", "leave_one_out"]


def attribute(
    model: HookedModel,
    pair: PreferencePair,
    *,
    method: Method = "leave_one_out",
    n_steps: int = 32,
    baseline: str | Float[Tensor, "d_model"] = "zero",
    objective: Objective = "sum",
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    max_tokens: int = MAX_TOKENS,
) -> Attribution:
    """Signed scores of the prompt's tokens for one record.

    f(x) = log p(chosen | x) - log p(rejected | x), the response held fixed (GrAInS, arXiv 2507.18043, section 3; unlike
    the authors' code the whole response is scored, at the right positions).

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        pair: the record.
        method: ``"leave_one_out"`` (f(x) - f(x without the token): exact, no gradients, one run per token),
            ``"integrated_gradients"`` (the paper's; Gauss-Legendre nodes on the straight path from the baseline), or
            ``"gradient_x_input"`` (one backward pass). Leave-one-out is the default because it measured best: on SmolLM2
            integrated gradients miss completeness by more than the quantity they attribute (look at ``gap``).
        n_steps: nodes of the path, for integrated gradients.
        baseline: x' for integrated gradients: ``"zero"``, ``"mean_embedding"``, ``"eos"``, ``"pad"`` or a ``[d_model]``
            vector, at every prompt position.
        objective: ``"sum"``, ``"mean"`` or ``"single"``.
        masker: what replaces the token, for leave-one-out.
        image_masker: what replaces a patch, for leave-one-out; and what the patches are at x' of integrated gradients
            with a baseline other than ``"zero"``.
        max_tokens: token budget of one pass.

    Returns:
        ``Attribution``: ``scores`` ``[pos]`` in nats, ``tokens``, ``gap`` (nats), ...

    Raises:
        ValueError: unknown method, objective, baseline or masker; ``n_steps < 1``; or a record the model cannot take.

    Example:
        >>> a = attribute(model, pair, method="integrated_gradients", n_steps=32)   # doctest: +SKIP
        >>> print(a)                                                               # doctest: +SKIP
        integrated_gradients: f(x) = +0.41 nats, gap -0.52 nats; largest: ' filthy' -1.20, ' fresh' +0.84, ...
    """
    return attribute_all(
        model,
        tokenize_pairs(model, [pair]),
        method=method,
        n_steps=n_steps,
        baseline=baseline,
        objective=objective,
        masker=masker,
        image_masker=image_masker,
        max_tokens=max_tokens,
    )[0]


def attribute_all(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    *,
    method: Method = "leave_one_out",
    n_steps: int = 32,
    baseline: str | Float[Tensor, "d_model"] = "zero",
    objective: Objective = "sum",
    masker: Masker = "mean_embedding",
    image_masker: ImageMasker = "mean_patch",
    content_only: bool = False,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
    on_result: Callable[[int, Attribution], Any] | None = None,
) -> list[Attribution]:
    """``attribute`` for many tokenized records, in full batches.

    Args:
        model, tokenized, method, n_steps, baseline, objective, masker, image_masker, max_tokens: as in
            ``attribute``.
        content_only: leave-one-out only: skip special and template tokens; their scores are NaN.
        progress: show a bar.
        on_result: called with (index, attribution) as soon as a record is finished, so that it can be kept.
    """
    check_attribution_options(method, n_steps, baseline, objective)
    for number, pair in enumerate(tokenized, start=1):
        try:
            token_weights(pair.chosen, pair.rejected, objective)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
    results: list[Attribution | None] = [None] * len(tokenized)
    n_rows = [len(t.inputs) * _n_runs(t, method, n_steps) for t in tokenized]
    with tqdm(total=len(tokenized), desc=method, unit="record", disable=not progress) as bar:
        for group in by_token_budget([t.longest for t in tokenized], max_tokens, n_rows):
            records = [tokenized[i] for i in group]
            if method == "leave_one_out":
                found = _leave_one_out(model, records, objective, masker, image_masker, content_only, max_tokens)
            else:
                start = _baseline(
                    model, records, baseline if method == "integrated_gradients" else "zero", image_masker
                )
                found = _gradient_scores(model, records, method, n_steps, start, objective, max_tokens)
            for index, attribution in zip(group, found, strict=True):
                results[index] = attribution
                if on_result is not None:
                    on_result(index, attribution)
            bar.update(len(group))
    return [r for r in results if r is not None]


def check_attribution_options(method: str, n_steps: int, baseline: str | Tensor, objective: str) -> None:
    """Refuse options that cannot work before anything runs (ValueError)."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; it is one of {get_args(Method)}")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; integrated gradients need at least one step")
    if isinstance(baseline, str) and baseline not in ("zero", "mean_embedding", "eos", "pad", "mask"):
        raise ValueError(f"baseline={baseline!r}; it is 'zero', 'mean_embedding', 'eos', 'pad', 'mask' or a vector")
    require_objective(objective)


def path_nodes(n_steps: int) -> tuple[Float[Tensor, "step"], Float[Tensor, "step"]]:
    """Gauss-Legendre nodes and weights on [0, 1]; exact for polynomials of degree ``2 * n_steps - 1``.

    Example:
        >>> nodes, weights = path_nodes(2)
        >>> round(float((weights * nodes**3).sum()), 6)  # integral of x^3
        0.25
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    return torch.tensor((nodes + 1) / 2, dtype=torch.float32), torch.tensor(weights / 2, dtype=torch.float32)


def interpolate_hook(
    model: HookedModel,
    alphas: Float[Tensor, "batch"],
    prompt_mask: Bool[Tensor, "batch pos"],
    baseline: Float[Tensor, "*position d_model"],
    probe: Float[Tensor, "batch pos d_model"] | None = None,
) -> FwdHooks:
    """One hook that moves the prompt's embeddings towards a baseline: ``x' + alpha * (x - x')``.

    Args:
        model: gives the hook point.
        alphas: ``[batch]``, place on the path of every row; 1 is the real input.
        prompt_mask: ``[batch, pos]``, True where to interpolate.
        baseline: ``[d_model]`` x', or ``[batch, pos, d_model]`` for one of its own at every position.
        probe: ``[batch, pos, d_model]`` zeros that require gradients; the gradient of anything with respect to it is the
            gradient with respect to the embeddings at that place of the path.

    Example:
        >>> hooks = interpolate_hook(model, torch.tensor([0.5]), mask, torch.zeros(576))   # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=hooks)                           # doctest: +SKIP
    """

    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        if prompt_mask.shape != act.shape[:2] or alphas.shape[0] != act.shape[0]:
            raise ValueError(
                f"alphas {tuple(alphas.shape)} and mask {tuple(prompt_mask.shape)} do not fit {tuple(act.shape)}"
            )
        real = act if probe is None else act.detach()
        start = baseline.to(real)
        moved = start + alphas.to(real)[:, None, None] * (real - start)
        new = torch.where(prompt_mask.to(act.device)[..., None], moved, real)
        return new if probe is None else new + probe.to(new.dtype)

    return [(attribution_point(model), hook_fn)]


def _n_runs(pair: TokenizedPair, method: str, n_steps: int) -> int:
    return {"integrated_gradients": n_steps, "gradient_x_input": 1, "leave_one_out": len(pair.prompt)}[method]


def _batches(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    runs: Iterable[tuple[int, int]],
    objective: Objective,
    max_tokens: int,
) -> Iterable[tuple[list[tuple[int, int]], Batch]]:
    """(record, variant) runs in batches under the token budget; a record in a batch stands for one run."""
    todo = list(runs)
    lengths, n_rows = [records[r].longest for r, _ in todo], [len(records[r].inputs) for r, _ in todo]
    for group in by_token_budget(lengths, max_tokens, n_rows):
        part = [todo[i] for i in group]
        yield part, scoring_batch(model, [records[r] for r, _ in part], objective)


def _gradient_scores(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    method: str,
    n_steps: int,
    start: Replacements,
    objective: Objective,
    max_tokens: int,
) -> list[Attribution]:
    is_ig = method == "integrated_gradients"
    nodes, weights = path_nodes(n_steps) if is_ig else (torch.ones(1), torch.ones(1))
    mean_grad = [torch.zeros(len(r.prompt), int(model.cfg.d_model)) for r in records]
    real = torch.zeros(len(records))
    runs = [(r, s) for r in range(len(records)) for s in range(len(nodes))]
    for part, batch in _batches(model, records, runs, objective, max_tokens):
        alphas = nodes[[s for _, s in part]].to(batch.ids.device)
        owner = [part[run][0] for run in batch.record.tolist()]
        values, grads = _prompt_gradients(model, batch, alphas, start.rows(owner, batch.offset, batch.ids))
        for row, run in enumerate(batch.record.tolist()):
            record, step = part[run]
            begin = int(batch.offset[row])
            mean_grad[record] += weights[step] * grads[row, begin : begin + len(records[record].prompt)].cpu()
        if not is_ig:
            for run, (record, _) in enumerate(part):
                real[record] = values[run]
    if not is_ig:
        return [
            _result(model, r, g, start.of(i), method, real[i].item(), None)
            for i, (r, g) in enumerate(zip(records, mean_grad, strict=True))
        ]
    ends = torch.zeros(2, len(records))
    with torch.no_grad():
        for part, batch in _batches(
            model, records, [(r, e) for r in range(len(records)) for e in (0, 1)], objective, max_tokens
        ):
            alphas = torch.tensor([float(e) for _, e in part], device=batch.ids.device)[batch.record]
            owner = [part[run][0] for run in batch.record.tolist()]
            there = start.rows(owner, batch.offset, batch.ids)
            hooks = interpolate_hook(model, alphas, batch.prompt_mask(), there)
            logprobs = batch_logprobs(model, batch, hooks)
            for run, (record, end) in enumerate(part):
                ends[end, record] = logprobs[run, 0] - logprobs[run, 1]
    return [
        _result(model, r, g, start.of(i), method, ends[1, i].item(), ends[0, i].item())
        for i, (r, g) in enumerate(zip(records, mean_grad, strict=True))
    ]


def _baseline(
    model: HookedModel, records: Sequence[TokenizedPair], baseline: str | Tensor, image_masker: ImageMasker
) -> Replacements:
    """x' of every record: one vector, and with an image a stand-in of its own at every patch."""
    if isinstance(baseline, str):
        return replacements(model, records, baseline, "zero" if baseline == "zero" else image_masker)
    return Replacements(baseline, (None,) * len(records), (None,) * len(records), ((),) * len(records))


def _prompt_gradients(
    model: HookedModel, batch: Batch, alphas: Float[Tensor, "run"], start: Float[Tensor, "*position d_model"]
) -> tuple[Float[Tensor, "run"], Float[Tensor, "batch pos d_model"]]:
    shape = (*batch.ids.shape, int(model.cfg.d_model))
    probe = torch.zeros(shape, device=batch.ids.device, requires_grad=True)
    hooks = interpolate_hook(model, alphas[batch.record], batch.prompt_mask(), start, probe)
    with torch.enable_grad():
        logprobs = batch_logprobs(model, batch, hooks)
        values = logprobs[:, 0] - logprobs[:, 1]
        (grads,) = torch.autograd.grad(values.sum(), probe)
    if not torch.isfinite(grads).all():
        raise ValueError(
            "the gradient has NaN or infinite entries; check the model's weights and its dtype (use float32)"
        )
    return values.detach(), grads


def _require_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinite entries; check the model's weights and its dtype (use float32)")


def _result(
    model: HookedModel,
    record: TokenizedPair,
    mean_grad: Float[Tensor, "pos d_model"],
    start: Tensor,
    method: str,
    value: float,
    baseline_value: float | None,
) -> Attribution:
    scores = ((prompt_embeddings(model, record) - start) * mean_grad).sum(-1)
    gap = None if baseline_value is None else float(scores.sum()) - (value - baseline_value)
    return _attribution(record, scores, method, value, baseline_value, gap)


def _leave_one_out(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    objective: Objective,
    masker: Masker,
    image_masker: ImageMasker,
    content_only: bool,
    max_tokens: int,
) -> list[Attribution]:
    stand_ins = None if masker == "attention" else replacements(model, records, masker, image_masker)
    base = score_pairs(model, records, objective=objective, max_tokens=max_tokens)
    _require_finite(base, "the log-likelihood")
    values = base[:, 0] - base[:, 1]
    scores = [torch.full((len(r.prompt),), float("nan")) for r in records]
    runs = [(i, p) for i, r in enumerate(records) for p in range(len(r.prompt)) if r.content[p] or not content_only]
    with torch.no_grad():
        for part, batch in _batches(model, records, runs, objective, max_tokens):
            rows = [part[run] for run in batch.record.tolist()]
            owner, masked = [r for r, _ in rows], [[p] for _, p in rows]
            hooks = hide(model, stand_ins, owner, masked, offset=batch.offset, like=batch.ids)
            logprobs = batch_logprobs(model, batch, hooks).cpu()
            for run, (record, position) in enumerate(part):
                scores[record][position] = values[record] - (logprobs[run, 0] - logprobs[run, 1])
    return [
        _attribution(r, s, "leave_one_out", v, None, None)
        for r, s, v in zip(records, scores, values.tolist(), strict=True)
    ]


def _attribution(
    record: TokenizedPair, scores: Tensor, method: str, value: float, baseline_value: float | None, gap: float | None
) -> Attribution:
    return Attribution(
        scores=scores,
        tokens=list(record.strings),
        content=torch.tensor(record.content),
        is_image=torch.tensor(record.is_image),
        gap=gap,
        objective=value,
        baseline_objective=baseline_value,
        method=method,
        spans=() if record.images is None else record.images.spans,
    )
