"""LoRA fine-tuning on the same records with peft (extra ``lora``): the baseline that changes weights, taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grains_tl._util.progress import progress_bar
from grains_tl.inference.batches import by_token_budget, scoring_batch
from grains_tl.inference.logprobs import batch_logprobs, score_pairs
from grains_tl.inference.objectives import margins
from grains_tl.models.hugging_face import is_linear
from grains_tl.models.running import is_bridge, run_blocks
from grains_tl.models.state import autograd
from grains_tl.records.pairs import PairLike
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import HookedModel

#: ``"sft"``: likelihood of the chosen responses alone. ``"dpo"``: the margin against the untrained model's
#: (arXiv 2305.18290), the objective the attributions use.
LoraLoss = Literal["sft", "dpo"]


@dataclass(frozen=True)
class LoraRun:
    """What a training run did.

    Attributes:
        losses: one per optimiser step, before that step.
        n_parameters: trained ones.
        modules: names of the linear layers that carry an adapter.

    Examples:
        >>> with lora_adapter(model, pairs) as run:                # doctest: +SKIP
        ...     print(run.losses[-1], run.n_parameters)            # doctest: +SKIP
    """

    losses: list[float]
    n_parameters: int
    modules: list[str]


@contextmanager
def lora_adapter(
    model: HookedModel,
    pairs: Iterable[PairLike],
    *,
    loss: LoraLoss = "sft",
    rank: int = 8,
    n_epochs: int = 3,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    beta: float = 0.1,
    seed: int = 0,
) -> Iterator[LoraRun]:
    """Train a LoRA adapter on the records and leave it in the model for the length of a ``with`` block.

    Every linear layer of the blocks gets an adapter of peft's (arXiv 2106.09685; on all of them: 2305.14314), inside
    the bridge's own modules, so that hooks, ``score_pairs``, ``generate`` and the rest see the tuned model. Nothing is
    merged: afterwards the model is bit for bit what it was, also after an exception.

    Args:
        model: a ``TransformerBridge``.
        pairs: the building records.
        loss: ``"sft"`` (mean over the chosen responses' tokens) or ``"dpo"`` (mean over records).
        rank: of the adapters; their scale is peft's alpha / r with alpha = 2 r.
        n_epochs: passes over the records.
        batch_size: records per optimiser step.
        learning_rate: of AdamW without weight decay, constant.
        beta: of the ``"dpo"`` loss.
        seed: of the adapters' start and the order of the records; the global generator is left alone.

    Yields:
        ``LoraRun``.

    Raises:
        ImportError: peft is not installed.
        ValueError: a ``HookedTransformer`` (peft works on Hugging Face modules), inference mode, or options out of range.

    Examples:
        >>> with lora_adapter(model, build, n_epochs=3) as run:                         # doctest: +SKIP
        ...     tuned = score_pairs(model, tokenized)
        >>> run.losses[0], run.losses[-1]                                               # doctest: +SKIP
        (6.21, 2.95)
    """
    peft = _require_peft()
    if not is_bridge(model):
        raise ValueError(
            "peft trains the modules of a Hugging Face model, and a HookedTransformer has none; load the model as a "
            "TransformerBridge for this baseline (gr.load_model(name))"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("an adapter cannot be trained inside torch.inference_mode(); train it outside")
    if loss not in ("sft", "dpo"):
        raise ValueError(f"loss={loss!r}; expected 'sft' or 'dpo'")
    if min(rank, n_epochs, batch_size) < 1 or learning_rate <= 0 or beta <= 0:
        raise ValueError("rank, n_epochs and batch_size are at least 1, learning_rate and beta positive")
    tokenized = tokenize_pairs(model, pairs)
    reference = margins(score_pairs(model, tokenized)) if loss == "dpo" else None
    generator = torch.Generator().manual_seed(seed)
    with _adapted(model, peft, rank, seed) as (parameters, modules):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        orders = [torch.randperm(len(tokenized), generator=generator) for _ in range(n_epochs)]
        batches = [batch.tolist() for order in orders for batch in order.split(batch_size)]
        losses = []
        for batch in progress_bar(batches, desc="lora", unit="step"):
            records = [tokenized[i] for i in batch]
            optimizer.zero_grad()
            start = None if reference is None else reference[batch]
            losses.append(_accumulate_gradients(model, records, start, beta))
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield LoraRun(losses, sum(p.numel() for p in parameters), modules)


def _accumulate_gradients(
    model: HookedModel,
    records: Sequence[TokenizedPair],
    reference: Float[Tensor, "record"] | None,
    beta: float,
) -> float:
    """Backward pass of one step's loss, in parts that fit the token budget; returns the loss."""
    if reference is None:  # chosen on both sides makes one row of it, and the rejected response is not run at all
        records = [replace(t, rejected=t.chosen) for t in records]
    n_tokens = sum(len(t.chosen) for t in records)
    total = 0.0
    with autograd(model):
        for group in by_token_budget([t.longest for t in records], [len(t.inputs) for t in records]):
            logprobs = batch_logprobs(model, scoring_batch(model, [records[i] for i in group]))
            if reference is None:
                part = -logprobs[:, 0].sum() / n_tokens
            else:
                gain = margins(logprobs) - reference[group].to(logprobs.device)
                part = -nn.functional.logsigmoid(beta * gain).sum() / len(records)
            part.backward()
            total += float(part.detach())
    return total


@contextmanager
def _adapted(model: Any, peft: Any, rank: int, seed: int) -> Iterator[tuple[list[nn.Parameter], list[str]]]:
    """The bridge's Hugging Face model with peft's layers in it; without them, and as frozen as before, afterwards."""
    hf_model = model.original_model
    if hasattr(hf_model, "peft_config"):
        raise ValueError("the model already carries a peft adapter; take that one out first")
    names = _running_linear_layers(model)
    places = [(hf_model.get_submodule(parent), child) for parent, _, child in (name.rpartition(".") for name in names)]
    before = [getattr(parent, child) for parent, child in places]
    required = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft draws the start of its adapters from the global generator, and sees by itself which way round GPT-2's
            # weights are
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
            tuner = peft.LoraModel(hf_model, config, "default")
        yield [p for p in tuner.parameters() if p.requires_grad], names
    finally:
        # not by peft's unload(): a bridge's modules answer for what they wrap, so it would take out those as well
        for (parent, child), module in zip(places, before, strict=True):
            setattr(parent, child, module)
        if hasattr(hf_model, "peft_config"):
            del hf_model.peft_config
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def _running_linear_layers(model: Any) -> list[str]:
    """Names, in the Hugging Face model, of the linear layers that a run through the blocks calls.

    Found by running, because a bridge splits the joint projections of some architectures and calls its own parts.
    """
    inside = {id(m) for block in model.blocks for m in block.modules()}
    named = [
        (name, module)
        for name, module in model.original_model.named_modules()
        if is_linear(module) and id(module) in inside
    ]
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name)) for name, module in named
    ]
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            run_blocks(model, ids, torch.ones_like(ids), stop=int(model.cfg.n_layers))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, _ in named if name in called]


def _require_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA training needs peft: pip install 'grains-tl[lora]'") from None
    return peft
