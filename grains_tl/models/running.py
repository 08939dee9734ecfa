"""Loading models, and the few places where ``TransformerBridge`` and ``HookedTransformer`` differ.

Nothing is wrapped: ``load_model`` returns TransformerLens' own object, and every function of the package takes one that
the user already has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl._util.checks import layer_numbers
from grains_tl.models.placement import input_device
from grains_tl.models.precision import exact_unembedding, full_precision
from grains_tl.models.state import require_hooked_model, require_ready
from grains_tl.types import BridgeModel, FwdHooks, HookedModel, PromptHooks


# -- what differs between the classes ---------------------------------------------------------------------------------
def is_bridge(model: HookedModel) -> TypeGuard[BridgeModel]:
    """True for a ``TransformerBridge``, which wraps a Hugging Face model."""
    return hasattr(model, "original_model")


def hugging_face_model(model: HookedModel) -> Any:
    """The Hugging Face model that a ``TransformerBridge`` wraps; its modules are the ones that run.

    Raises:
        ValueError: a ``HookedTransformer``, which has its own modules.
    """
    if not is_bridge(model):
        raise ValueError(
            "expected a TransformerBridge, got a HookedTransformer, which holds no Hugging Face model; load the model "
            "with kind='bridge'"
        )
    return model.original_model


def attribution_point(model: HookedModel) -> str:
    """The hook point where input tokens are interpolated and masked.

    ``hook_embed`` for text models (position embeddings come later and stay untouched), ``blocks.0.hook_resid_pre`` for
    vision-language models (image features are merged there).
    """
    return "blocks.0.hook_resid_pre" if getattr(model.cfg, "is_multimodal", False) else "hook_embed"


def resid_post(layer: int) -> str:
    """Name of the residual stream after block ``layer``.

    Examples:
        >>> resid_post(12)
        'blocks.12.hook_resid_post'
    """
    return f"blocks.{layer}.hook_resid_post"


def stream_after(layer: int) -> str:
    """Name of the residual stream after block ``layer``; -1 is the stream before block 0.

    Examples:
        >>> stream_after(12), stream_after(-1)
        ('blocks.12.hook_resid_post', 'blocks.0.hook_resid_pre')
    """
    return "blocks.0.hook_resid_pre" if layer == -1 else resid_post(layer)


def device_of(model: HookedModel) -> torch.device:
    """The device the model's embedding is on: inputs go there."""
    return input_device(model)


def existing_layers(model: HookedModel, layers: Sequence[int]) -> list[int]:
    """The layers as they were given, for what is read beside other lists of the caller's.

    Raises:
        ValueError: a layer is not in ``0 .. n_layers - 1``, or none is given.
    """
    require_hooked_model(model)
    n_layers = int(model.cfg.n_layers)
    layers = layer_numbers(layers)
    bad = [layer for layer in layers if not 0 <= layer < n_layers]
    if bad:
        raise ValueError(f"layers {bad} do not exist; the model has layers 0 to {n_layers - 1}")
    if not layers:
        raise ValueError(f"no layers given; choose from 0 to {n_layers - 1}")
    return layers


def require_layers(model: HookedModel, layers: Sequence[int]) -> list[int]:
    """``existing_layers`` sorted and without repeats."""
    return sorted(set(existing_layers(model, layers)))


def listed_hooks(fwd_hooks: Any) -> FwdHooks:
    """Hooks as a list of ``(name, fn)``.

    Raises:
        ValueError: something else, such as the vectors themselves, or steering whose scope needs the prompt's length.
    """
    if fwd_hooks is None:
        return []
    if isinstance(fwd_hooks, PromptHooks):
        if fwd_hooks.needs_prompt:
            raise ValueError(
                f"{fwd_hooks} steers prompt and response differently, and where the prompt ends is not known here; "
                "give steering.for_prompt(prompt_len)"
            )
        return fwd_hooks.for_prompt(None)
    if hasattr(fwd_hooks, "hooks"):
        raise ValueError(
            f"a {type(fwd_hooks).__name__} is not a list of hooks; pass vectors.hooks(alpha, layers=[...])"
        )
    pairs = list(fwd_hooks) if isinstance(fwd_hooks, (list, tuple)) else None
    if pairs is None or not all(isinstance(p, (list, tuple)) and len(p) == 2 and callable(p[1]) for p in pairs):
        raise ValueError(
            f"expected hooks as a list of (name, fn) pairs with fn(act, hook), got {type(fwd_hooks).__name__}"
        )
    return pairs


def require_hook_names(model: HookedModel, fwd_hooks: FwdHooks) -> None:
    """Refuse hook names the model does not have (a TransformerLens 3 bridge would run silently without them).

    Raises:
        KeyError: naming the unknown hook points and the nearest ones that exist.
    """
    if not fwd_hooks:
        return
    known = model.hook_dict
    missing = sorted({name for name, _ in fwd_hooks if isinstance(name, str) and name not in known})
    if missing:
        import difflib

        near = difflib.get_close_matches(missing[0], list(known), n=3)
        raise KeyError(f"the model has no hook point {missing}; similar names: {near}")


@contextmanager
def hooked(model: HookedModel, fwd_hooks: FwdHooks) -> Iterator[None]:
    """``model.hooks`` for a run that can be trusted; hooks are gone afterwards, whatever happens inside.

    Raises:
        KeyError: a hook name that the model does not have.
        ValueError: no list of hooks, or a model that is not ready (``require_ready``).
    """
    require_ready(model)
    fwd_hooks = listed_hooks(fwd_hooks)
    require_hook_names(model, fwd_hooks)
    if not fwd_hooks:
        yield
        return
    with model.hooks(fwd_hooks=fwd_hooks):
        yield


def forward_logits(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    keep: Int[Tensor, "kept"],
    fwd_hooks: FwdHooks | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch kept vocab"]:
    """Logits at the positions ``keep`` only, with hooks; the unembedding is not computed anywhere else.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        ids: token ids, padded on either side.
        attention_mask: 1 at real tokens.
        keep: positions whose logits are wanted, the same for every row.
        fwd_hooks: hooks to run with; they see the full ``[batch, pos, d_model]`` residual.
        inputs: the images of a vision-language model (``Batch.inputs``).
    """
    _require_images(model, ids, inputs)
    with hooked(model, fwd_hooks or []), exact_unembedding(model):
        if is_bridge(model):
            # use_cache=False: a key-value cache would only cost memory here
            logits = model(ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False, **(inputs or {}))
            # an architecture that ignores logits_to_keep returns every position
            return logits if logits.shape[1] == keep.shape[0] else logits[:, keep]
        side = padding_side(attention_mask)
        resid = model(ids, attention_mask=attention_mask, padding_side=side, stop_at_layer=model.cfg.n_layers)
        with full_precision(model):
            return model.unembed(final_norm(model, resid[:, keep]))


def padding_side(attention_mask: Int[Tensor, "batch pos"]) -> Literal["left", "right"]:
    """Where rows are padded, which a ``HookedTransformer`` wants to be told."""
    return "left" if bool((attention_mask[:, 0] == 0).any()) else "right"


def _require_images(model: HookedModel, ids: Int[Tensor, "batch pos"], inputs: Mapping[str, Tensor] | None) -> None:
    """Image tokens without an image would run as placeholder embeddings, silently (the authors' code does that)."""
    if not inputs and not torch.equal(ids, without_image_tokens(model, ids)):
        raise ValueError("the ids hold image tokens, but no image was given; pass the processor's tensors as inputs")


def without_image_tokens(model: HookedModel, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The ids with the neighbouring id in place of image tokens, for made-up prompts."""
    if not getattr(model.cfg, "is_multimodal", False):
        return ids
    token = getattr(hugging_face_model(model).config, "image_token_id", None)
    return ids if token is None else torch.where(ids == token, ids - 1, ids)


def final_norm(model: HookedModel, resid: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
    """What the unembedding reads; a HookedTransformer with ``normalization_type=None`` has no ``ln_final``."""
    norm = getattr(model, "ln_final", None)
    return resid if norm is None else norm(resid)


def embed_tokens(model: HookedModel, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
    """Token embeddings as ``hook_embed`` shows them."""
    with torch.no_grad():
        return model.embed(ids).detach()


def embedding_table(model: HookedModel) -> Float[Tensor, "vocab d_model"] | None:
    """All token embeddings as they stand in the model's weights, uncopied; ``None`` where ``hook_embed`` shows others.

    Looked at on some tokens: a model may scale its embeddings or have hooks on them.
    """
    size, device = int(model.cfg.d_vocab), device_of(model)
    some = torch.linspace(0, size - 1, min(size, 16)).long().to(device)
    shown = embed_tokens(model, some[None])[0]
    for table in getattr(model.embed, "parameters", tuple)():
        offloaded = table.device.type == "meta"
        if not offloaded and table.shape == (size, shown.shape[-1]) and torch.equal(table.detach()[some], shown):
            return table.detach()
    return None


def run_blocks(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    stop: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Run the blocks ``0 .. stop - 1`` for the sake of the hooks on them; no logits.

    Stopping early saves the upper blocks and the unembedding; needs ``1 <= stop <= n_layers``.
    """
    require_ready(model)
    _require_images(model, ids, inputs)
    keep = torch.zeros(1, dtype=torch.long, device=ids.device)
    # rows that share a prompt bring a mask of their own
    named = {"attention_mask": attention_mask, "use_cache": False, **(inputs or {})}
    if is_bridge(model) and stop == model.cfg.n_layers:
        model(ids, logits_to_keep=keep, **named)
    elif is_bridge(model):
        model(ids, stop_at_layer=stop, **named)
    else:
        side = padding_side(attention_mask)
        model(ids, attention_mask=attention_mask, padding_side=side, stop_at_layer=stop)
