"""Choosing tokens by their scores, and taking tokens out of the model's input. Both as plain data and plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl.models import attribution_point, device_of, embed_tokens
from grains_tl.tokens import token_rules
from grains_tl.types import Attribution, FwdHooks, HookedModel

#: What stands in for a masked token: end-of-text (the paper's), pad or mask token, the vocabulary's mean embedding, zeros,
#: or nothing at all (``"attention"``: no later position attends to it). The mean embedding is the default: an
#: end-of-text token disturbs SmolLM2 as such, and vectors built with it are about half as strong.
Masker = Literal["eos", "pad", "mask", "mean_embedding", "zero", "attention"]


@dataclass(frozen=True)
class Selection:
    """Positions of the chosen tokens in one prompt, strongest first.

    Example:
        >>> Selection(toward_chosen=(4, 7), toward_rejected=(2,)).toward_chosen
        (4, 7)
    """

    toward_chosen: tuple[int, ...]
    toward_rejected: tuple[int, ...]


def select_tokens(
    attribution: Attribution, top_k: int, top_k_image: int | None = None, *, spare_end: bool = False
) -> Selection:
    """The ``top_k`` content tokens with the largest positive score, and with the most negative one.

    Fewer come back where fewer have that sign (arXiv 2507.18043, section 3: I+ and I-). Special and template tokens are
    never chosen.

    Args:
        attribution: scores of one record.
        top_k: tokens on each side; with ``top_k_image`` text tokens alone (0 for none).
        top_k_image: patches on each side, chosen apart from the text; ``None`` lets both compete for ``top_k``.
        spare_end: never choose the prompt's last token, where ``readout="prompt_end"`` reads the residual: masking it
            replaces what is read. Notebook 03 shows what that does.

    Raises:
        ValueError: nothing to choose (``top_k`` and ``top_k_image`` not positive).

    Example:
        >>> a = Attribution(torch.tensor([.5, -1., 2.]), ["a", "b", "c"], torch.tensor([True] * 3),
        ...                 torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> select_tokens(a, top_k=1)
        Selection(toward_chosen=(2,), toward_rejected=(1,))
    """
    check_budget(top_k, top_k_image)
    scores = torch.where(attribution.content, attribution.scores.nan_to_num(0.0), torch.zeros(()))
    if spare_end:
        scores = torch.cat([scores[:-1], torch.zeros(1)])
    order = scores.argsort(descending=True, stable=True).tolist()
    up = _first([i for i in order if scores[i] > 0], attribution.is_image, top_k, top_k_image)
    down = _first([i for i in reversed(order) if scores[i] < 0], attribution.is_image, top_k, top_k_image)
    return Selection(tuple(up), tuple(down))


def check_budget(top_k: int, top_k_image: int | None = None) -> None:
    """Refuse numbers that choose nothing (ValueError)."""
    if top_k_image is None and top_k < 1:
        raise ValueError(f"top_k={top_k}; at least one token must be chosen")
    if top_k_image is not None and (min(top_k, top_k_image) < 0 or top_k + top_k_image < 1):
        raise ValueError(f"top_k={top_k}, top_k_image={top_k_image}; at least one token must be chosen, none negative")


def _first(order: list[int], is_image: Tensor, top_k: int, top_k_image: int | None) -> list[int]:
    if top_k_image is None:
        return order[:top_k]
    text = [i for i in order if not is_image[i]][:top_k]
    patches = [i for i in order if is_image[i]][:top_k_image]
    return [i for i in order if i in {*text, *patches}]


def random_selection(
    content: Sequence[bool], like: Selection, generator: torch.Generator, is_image: Sequence[bool] | None = None
) -> Selection:
    """As many content tokens as ``like`` has, drawn at random (the two sides may overlap only if they must).

    With ``is_image`` as many text tokens and as many patches, each drawn among its kind.
    """
    if is_image is not None and any(is_image):
        drawn = []
        for kind in (False, True):
            of_kind = [c and i == kind for c, i in zip(content, is_image, strict=True)]
            sides = (
                tuple(p for p in side if is_image[p] == kind) for side in (like.toward_chosen, like.toward_rejected)
            )
            drawn.append(random_selection(of_kind, Selection(*sides), generator))
        text, patches = drawn
        return Selection(text.toward_chosen + patches.toward_chosen, text.toward_rejected + patches.toward_rejected)
    positions = torch.tensor([i for i, keep in enumerate(content) if keep])
    order = positions[torch.randperm(len(positions), generator=generator)].tolist()
    n_up, n_down = len(like.toward_chosen), len(like.toward_rejected)
    doubled = order + order  # enough even if the two sides together ask for more than there is
    return Selection(tuple(doubled[:n_up]), tuple(doubled[n_up : n_up + n_down]))


def replacement_embedding(model: HookedModel, how: str) -> Float[Tensor, "d_model"]:
    """The vector that stands in for a masked token, in the space of the attribution point.

    Raises:
        ValueError: an unknown masker, or ``"mask"`` for a tokenizer without a mask token.
    """
    if how == "zero":
        return torch.zeros(int(model.cfg.d_model), device=device_of(model))
    if how == "mean_embedding":
        vocabulary = torch.arange(int(model.cfg.d_vocab), device=device_of(model))
        parts = (embed_tokens(model, part[None])[0] for part in vocabulary.split(8192))
        # double precision on the CPU: Apple's GPUs have none
        total = sum(part.float().sum(0).cpu().double() for part in parts)
        return (total / len(vocabulary)).float().to(vocabulary.device)  # type: ignore[union-attr, operator]
    rules = token_rules(model)
    token = {"eos": rules.eos, "pad": rules.pad, "mask": getattr(model.tokenizer, "mask_token_id", None)}
    if how not in token:
        raise ValueError(f"masker {how!r}; it is one of {get_args(Masker)}")
    if token[how] is None:
        raise ValueError("masker 'mask': the tokenizer has no mask token; use 'eos', 'mean_embedding' or 'attention'")
    return embed_tokens(model, torch.tensor([[token[how]]], device=device_of(model)))[0, 0]


def mask_hook(
    model: HookedModel,
    masked: Bool[Tensor, "batch pos"],
    how: Masker = "mean_embedding",
    replacement: Float[Tensor, "*position d_model"] | None = None,
) -> FwdHooks:
    """Hooks that take tokens out of the input.

    Args:
        model: gives the hook points (and the replacement, if none is passed).
        masked: ``[batch, pos]``, True at the tokens to take out.
        how: what to put there; ``"attention"`` leaves the token where it is and lets no other position attend to it.
        replacement: ``[d_model]``, to avoid computing it again, or ``[batch, pos, d_model]`` for a stand-in of its own
            at every position (``replacements.Replacements.rows`` makes one for images).

    Returns:
        ``[(name, fn)]`` for ``run_with_hooks``: one hook at the attribution point, or one per layer for ``"attention"``.

    Example:
        >>> hooks = mask_hook(model, masked, how="zero")                 # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=hooks)          # doctest: +SKIP
    """
    if how == "attention":
        _require_knock_out(model)
        return [(f"blocks.{layer}.attn.hook_attn_scores", _knock_out(masked)) for layer in range(model.cfg.n_layers)]
    vector = replacement_embedding(model, how) if replacement is None else replacement

    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        _require_shape("mask", masked, act)
        return torch.where(masked.to(act.device)[..., None], vector.to(act), act)

    return [(attribution_point(model), hook_fn)]


def _require_knock_out(model: HookedModel) -> None:
    """Refuse attention whose scores the hooks see but cannot change (Qwen-VL, measured: ``check_model``)."""
    kind = type(getattr(model.blocks[0], "attn", None)).__name__
    if getattr(model.cfg, "is_multimodal", False) and kind == "AttentionBridge":
        raise ValueError(
            "masker='attention' would change nothing on this model: TransformerLens shows its attention scores but does "
            "not take them back; use another masker, 'mean_embedding' for instance"
        )


def _knock_out(masked: Bool[Tensor, "batch pos"]) -> Any:
    def hook_fn(act: Float[Tensor, "batch head q k"], hook: Any) -> Float[Tensor, "batch head q k"]:
        if masked.shape != (act.shape[0], act.shape[-1]):
            raise ValueError(f"mask of shape {tuple(masked.shape)} does not fit attention scores {tuple(act.shape)}")
        # a position may still attend to itself: a row without any key would be NaN
        itself = torch.eye(act.shape[-1], dtype=torch.bool, device=act.device)[-act.shape[-2] :]
        hidden = masked.to(act.device)[:, None, None, :] & ~itself
        return act.masked_fill(hidden, torch.finfo(act.dtype).min)

    return hook_fn


def _require_shape(name: str, mask: Bool[Tensor, "batch pos"], act: Tensor) -> None:
    if mask.shape != act.shape[:2]:
        raise ValueError(f"{name} of shape {tuple(mask.shape)} does not fit activations {tuple(act.shape)}")
