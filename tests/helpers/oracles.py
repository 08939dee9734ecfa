"""Independent answers: the same quantities computed with a plain Hugging Face model and plain PyTorch, no package code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grains_tl.tokens.pairs import TokenizedPair


def embeddings(hf: Any, ids: Sequence[int]) -> Tensor:
    """Token embeddings ``[1, pos, d_model]``."""
    return hf.get_input_embeddings()(torch.tensor([list(ids)]))


def response_logprobs(
    hf: Any, prompt: Sequence[int], response: Sequence[int], prompt_embeds: Tensor | None = None
) -> Tensor:
    """``[batch, response]`` log-probability of each response token, from full logits; the prompt may be embeddings."""
    if prompt_embeds is None:
        prompt_embeds = embeddings(hf, prompt)
    tail = embeddings(hf, response).expand(prompt_embeds.shape[0], -1, -1)
    logits = hf(inputs_embeds=torch.cat([prompt_embeds, tail], dim=1)).logits
    log_softmax = logits.float().log_softmax(-1)[:, len(prompt) - 1 : -1]
    targets = torch.tensor(list(response))[None, :, None].expand(prompt_embeds.shape[0], -1, 1)
    return log_softmax.gather(-1, targets)[..., 0]


def pair_logprobs(
    hf: Any, pair: TokenizedPair, objective: str = "sum", prompt_embeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Objective of chosen and of rejected, each ``[batch]``."""
    both = [response_logprobs(hf, pair.prompt, r, prompt_embeds) for r in (pair.chosen, pair.rejected)]
    if objective == "sum":
        return both[0].sum(-1), both[1].sum(-1)
    if objective == "mean":
        return both[0].mean(-1), both[1].mean(-1)
    differs = [a != b for a, b in zip(pair.chosen, pair.rejected, strict=False)].index(True)
    return both[0][:, differs], both[1][:, differs]


def margin(hf: Any, pair: TokenizedPair, objective: str = "sum", prompt_embeds: Tensor | None = None) -> Tensor:
    """f(x) ``[batch]``."""
    chosen, rejected = pair_logprobs(hf, pair, objective, prompt_embeds)
    return chosen - rejected


def block(hf: Any, layer: int) -> torch.nn.Module:
    """The decoder layer of a Llama or a GPT-2."""
    return hf.model.layers[layer] if hasattr(hf, "model") else hf.transformer.h[layer]


def n_blocks(hf: Any) -> int:
    """Number of decoder layers."""
    return int(hf.config.num_hidden_layers)


def first_tensor(output: Any) -> Tensor:
    """A decoder layer's hidden states; some return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def edited(hf: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain PyTorch forward hook that replaces the output of a decoder layer."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        new = edit(first_tensor(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block(hf, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def residuals(hf: Any, ids: Sequence[int], prompt_embeds: Tensor | None = None) -> Tensor:
    """``[layer, pos, d_model]`` outputs of all decoder layers for one sequence."""
    found: list[Tensor] = []
    handles = [
        block(hf, layer).register_forward_hook(
            lambda module, args, output: found.append(first_tensor(output)[0].detach())
        )
        for layer in range(n_blocks(hf))
    ]
    try:
        with torch.no_grad():
            hf(inputs_embeds=embeddings(hf, ids) if prompt_embeds is None else prompt_embeds)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def steered(act: Tensor, step: Tensor, *, renorm: bool = False) -> Tensor:
    """The paper's steering formula, written out again: h + s, or (h + s) |h| / |h + s|."""
    moved = act + step
    return moved / moved.norm(dim=-1, keepdim=True) * act.norm(dim=-1, keepdim=True) if renorm else moved


def greedy(hf: Any, prompt: Sequence[int], n_new: int, layer: int | None = None, edit: Any = None) -> list[int]:
    """Greedy decoding without a cache; ``edit(act)`` sees the whole sequence at every step. Stops after eos (id 2)."""
    ids = list(prompt)
    for _ in range(n_new):
        with torch.no_grad():
            if layer is None:
                logits = hf(torch.tensor([ids])).logits
            else:
                with edited(hf, layer, edit):
                    logits = hf(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == hf.config.eos_token_id:
            break
    return ids[len(prompt) :]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def plain_kl(model: Any, step: Any, rows: Sequence[Sequence[int]]) -> float:
    """KL(steered || base) of the tokens that are predicted in some texts, nats per token, written out."""
    found = []
    both: list[Any] = [[], step.hooks()]
    for ids in rows:
        base, new = (
            model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=hooks)[0, :-1].double().log_softmax(-1)
            for hooks in both
        )
        found.append((new.exp() * (new - base)).sum(-1))
    return float(torch.cat(found).mean())
