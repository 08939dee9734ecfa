"""Taking tokens out of the model's input: what replaces a masked token, and the hooks that put it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.models.running import attribution_point, device_of, embed_tokens, embedding_table
from grains_tl.tokens.rules import token_rules
from grains_tl.types import FwdHooks, HookedModel

#: What stands in for a masked token: end-of-text (the paper's), pad or mask token, the vocabulary's mean embedding, zeros,
#: or nothing at all (``"attention"``: no later position attends to it). The mean embedding is the default: an
#: end-of-text token disturbs SmolLM2 as such, and vectors built with it are about half as strong.
Masker = Literal["eos", "pad", "mask", "mean_embedding", "zero", "attention"]

#: What stands in for a patch: the mean of its image's patches (colour and brightness stay, the place says nothing),
#: zeros, the same patch of the blurred image, or the nearest patches that are not masked themselves.
ImageMasker = Literal["mean_patch", "zero", "blurred_image", "neighbour_patch"]


@dataclass(frozen=True)
class Mask:
    """What replaces a token or an image patch that is taken out of the prompt.

    Attributes:
        text: ``"mean_embedding"`` (of the vocabulary), ``"eos"`` (the paper's), ``"pad"``, ``"mask"``, ``"zero"``, or
            ``"attention"``, which leaves the token in place and lets no other position attend to it.
        image: ``"mean_patch"`` (of the same image), ``"zero"``, ``"blurred_image"`` or ``"neighbour_patch"``.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> Mask("eos")
        Mask(text='eos', image='mean_patch')
    """

    text: Masker = "mean_embedding"
    image: ImageMasker = "mean_patch"

    def __post_init__(self) -> None:
        for name, value, known in (("text", self.text, get_args(Masker)), ("image", self.image, get_args(ImageMasker))):
            if value not in known:
                raise OptionError(f"mask: {name}={value!r} is not known; expected one of {', '.join(known)}")

    @classmethod
    def of(cls, mask: Mask | Masker) -> Mask:
        """A mask, or the name of what replaces text tokens, as a ``Mask``."""
        return mask if isinstance(mask, Mask) else cls(text=mask)

    def check(self, model: HookedModel) -> None:
        """Refuse a mask that this model's tokenizer cannot give (ValueError), before anything long runs."""
        if self.text == "mask":
            replacement_embedding(model, self.text)


def replacement_embedding(model: HookedModel, how: str) -> Float[Tensor, "d_model"]:
    """The vector that stands in for a masked token, in the space of the attribution point.

    Raises:
        ValueError: an unknown mask, or ``"mask"`` for a tokenizer without a mask token.
    """
    if how == "zero":
        return torch.zeros(int(model.cfg.d_model), device=device_of(model))
    if how == "mean_embedding":
        vocabulary = torch.arange(int(model.cfg.d_vocab), device=device_of(model))
        table = embedding_table(model)
        if table is None:
            parts = (embed_tokens(model, part[None])[0] for part in vocabulary.split(8192))
        else:
            parts = iter(table.split(8192))
        # double precision on the CPU: Apple's GPUs have none
        zero = torch.zeros(int(model.cfg.d_model), dtype=torch.float64)
        total = sum((part.float().sum(0).cpu().double() for part in parts), zero)
        return (total / len(vocabulary)).float().to(vocabulary.device)
    rules = token_rules(model)
    token = {"eos": rules.eos, "pad": rules.pad, "mask": getattr(model.tokenizer, "mask_token_id", None)}
    if how not in token:
        raise ValueError(f"mask {how!r} does not name an embedding; expected one of {get_args(Masker)}")
    if token[how] is None:
        raise ValueError("mask 'mask': the tokenizer has no mask token; use 'eos', 'mean_embedding' or 'attention'")
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
            at every position (``hooks.stand_ins.Replacements.rows`` makes one for images).

    Returns:
        ``[(name, fn)]`` for ``run_with_hooks``: one hook at the attribution point, or one per layer for ``"attention"``.

    Examples:
        >>> hooks = mask_hook(model, masked, how="zero")                 # doctest: +SKIP
        >>> logits = model.run_with_hooks(ids, fwd_hooks=hooks)          # doctest: +SKIP
    """
    if how == "attention":
        _require_knock_out(model)
        return [(f"blocks.{layer}.attn.hook_attn_scores", _knock_out(masked)) for layer in range(model.cfg.n_layers)]
    vector = replacement_embedding(model, how) if replacement is None else replacement

    def hook_fn(act: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        _require_shape("mask", masked, act)
        return torch.where(rearrange(masked.to(act.device), "batch pos -> batch pos 1"), vector.to(act), act)

    return [(attribution_point(model), hook_fn)]


def _require_knock_out(model: HookedModel) -> None:
    """Refuse attention whose scores the hooks see but cannot change (Qwen-VL, measured: ``check_model``)."""
    kind = type(getattr(model.blocks[0], "attn", None)).__name__
    if getattr(model.cfg, "is_multimodal", False) and kind == "AttentionBridge":
        raise ValueError(
            "mask='attention' would change nothing on this model: TransformerLens shows its attention scores but does "
            "not take them back; use another mask, 'mean_embedding' for instance"
        )


def _knock_out(masked: Bool[Tensor, "batch pos"]) -> Any:
    def hook_fn(act: Float[Tensor, "batch head q k"], hook: Any) -> Float[Tensor, "batch head q k"]:
        if masked.shape != (act.shape[0], act.shape[-1]):
            raise ValueError(f"mask of shape {tuple(masked.shape)} does not fit attention scores {tuple(act.shape)}")
        # a position may still attend to itself: a row without any key would be NaN
        itself = torch.eye(act.shape[-1], dtype=torch.bool, device=act.device)[-act.shape[-2] :]
        hidden = rearrange(masked.to(act.device), "batch key -> batch 1 1 key") & ~itself
        return act.masked_fill(hidden, torch.finfo(act.dtype).min)

    return hook_fn


def _require_shape(name: str, mask: Bool[Tensor, "batch pos"], act: Tensor) -> None:
    if mask.shape != act.shape[:2]:
        raise ValueError(f"{name} of shape {tuple(mask.shape)} does not fit activations {tuple(act.shape)}")
