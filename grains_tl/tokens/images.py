"""Everything about images: reading them, the model's processor, and its tensors in padded batches.

The processor (``model.processor``, as transformers makes it) is applied once per record, in ``process_images``. All it
returns goes on to the model: what is left out (token types, sizes, grids) silently changes positions in some families.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from grains_tl.models.building import transformer_lens_major
from grains_tl.models.running import device_of, hugging_face_model
from grains_tl.tokens.patches import ImageSpan, image_spans, image_token_id
from grains_tl.types import HookedModel, Message, Text

#: Families that TransformerLens 3.9 runs wrongly on images (measured, tests/models/test_vision_families.py).
NEEDS_TL4 = ("gemma3",)


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """The images of one prompt, as the model takes them.

    Attributes:
        inputs: the processor's image tensors (``pixel_values``, ``image_sizes``, ``image_grid_thw``, ...), one record.
        token_inputs: what the processor says about every prompt token (``mm_token_type_ids``, ...), ``[pos]`` each.
        is_image: for every prompt token, whether it is an image feature.
        spans: the patch grids, see ``ImageSpan``.
        images: the pictures (PIL, RGB).
        text: the prompt with one placeholder per image.
        digest: fingerprint of the image tensors.
    """

    inputs: Mapping[str, Tensor]
    token_inputs: Mapping[str, tuple[int, ...]]
    is_image: tuple[bool, ...]
    spans: tuple[ImageSpan, ...]
    images: tuple[Any, ...]
    text: str
    digest: str

    @property
    def patches(self) -> frozenset[int]:
        """Prompt positions that show a part of an image (image tokens without row separators)."""
        return frozenset(p for span in self.spans for p in span.positions.flatten().tolist())


def require_processor(model: HookedModel) -> Any:
    """The model's processor.

    Raises:
        ValueError: there is none, the model takes no images, or it takes them wrongly in this TransformerLens.
    """
    image_token_id(model)
    family = hugging_face_model(model).config.model_type
    if family in NEEDS_TL4 and transformer_lens_major() < 4:
        raise ValueError(
            f"{family} gives wrong results with images in TransformerLens 3 (logits are off by as much as their "
            "size, see docs/vision-families.md); install TransformerLens 4, or leave the image out"
        )
    processor = getattr(model, "processor", None)
    if processor is None:
        raise ValueError(
            "the model has no processor, so it cannot take an image; load it with load_model, or set "
            "model.processor = transformers.AutoProcessor.from_pretrained(name)"
        )
    return processor


def processed(model: HookedModel, pictures: Sequence[Any], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
    """What the model's processor makes of pictures and texts, one picture per text, on the model's device."""
    found = require_processor(model)(images=list(pictures), text=list(texts), return_tensors="pt", **options)
    return {name: value.to(device_of(model)) for name, value in found.items()}


def template_owner(model: HookedModel) -> Any:
    """What renders conversations: the processor, where it has a chat template, else the tokenizer."""
    processor = getattr(model, "processor", None)
    return processor if getattr(processor, "chat_template", None) else model.tokenizer


def with_placeholders(model: HookedModel, prompt: Text, n_images: int) -> Text:
    """The prompt with a place for every image: in front, unless it has its own.

    Raises:
        ValueError: the prompt's own places are not as many as the images.
    """
    if isinstance(prompt, str):
        if not n_images:
            return prompt
        token = _placeholder(model)
        found = prompt.count(token)
        if found not in (0, n_images):
            raise ValueError(f"the prompt has {found} placeholders {token!r} for {n_images} image(s)")
        return prompt if found else _framed(model, token) * n_images + "\n" + prompt
    messages = list(prompt)
    if not n_images and not any(isinstance(m.get("content"), (list, tuple)) for m in messages):
        return messages if template_owner(model) is model.tokenizer else [as_parts(m) for m in messages]
    messages = [as_parts(m) for m in messages]
    found = sum(part.get("type") == "image" for m in messages for part in m["content"])
    if found not in (0, n_images):
        raise ValueError(f"the conversation has {found} image part(s) for {n_images} image(s)")
    if found == n_images:
        return messages
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
    pictures: list[Any] = [{"type": "image"}] * n_images
    messages[first] = {**messages[first], "content": [*pictures, *messages[first]["content"]]}
    return messages


def _placeholder(model: HookedModel) -> str:
    """What stands for an image in a text before the processor expands it."""
    processor = require_processor(model)
    # Gemma 3 expands its begin-of-image token; in older transformers (5.9) ``image_token`` is what it expands it to
    gemma3 = hugging_face_model(model).config.model_type == "gemma3"
    return str(processor.boi_token if gemma3 else processor.image_token)


def _framed(model: HookedModel, token: str) -> str:
    """The placeholder between the markers that some families (Qwen-VL) want around it."""
    config = hugging_face_model(model).config
    ends = [getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end")]
    if None in ends:
        return token
    start, end = model.tokenizer.convert_ids_to_tokens(ends)
    return f"{start}{token}{end}"


def refuse_lost_image(model: HookedModel, text: str, ids: Sequence[int]) -> None:
    """A prompt with a place for an image and no image would be scored as text, with numbers that mean nothing.

    Raises:
        ValueError: an image token or placeholder in a prompt that came without an image.
    """
    if not getattr(model.cfg, "is_multimodal", False):
        return
    processor = getattr(model, "processor", None)
    if image_token_id(model) in ids or (processor is not None and _placeholder(model) in text):
        raise ValueError(
            "the prompt has a placeholder for an image, but no image was given; pass image=..., or remove the placeholder"
        )


def as_parts(message: Message) -> dict[str, Any]:
    """The message with its content as a list of parts, as the templates of vision-language models take it."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    return {**message, "content": parts}


def process_images(
    model: HookedModel, text: str, images: Sequence[Any], *, front: Sequence[int] = ()
) -> tuple[list[int], ImageInputs]:
    """Ids of a rendered prompt with its image tokens expanded, and everything else the processor made of the images.

    Args:
        model: with its processor.
        text: the prompt with one placeholder per image.
        images: from ``load_images``.
        front: ids to put in front.

    Raises:
        ValueError: no processor, or the processor does not take text and images together.
    """
    processor = require_processor(model)
    # one list per prompt: LLaVA-OneVision cuts a lone image into tiles, and takes several of one prompt whole
    found = dict(processor(text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt"))
    ids = found.pop("input_ids")[0].tolist()
    found.pop("attention_mask", None)
    per_token = {
        key: (*([0] * len(front)), *value[0].tolist()) for key, value in found.items() if key.endswith("token_type_ids")
    }
    inputs = {key: torch.as_tensor(value) for key, value in found.items() if key not in per_token}
    ids = [*front, *ids]
    image_token = image_token_id(model)
    if image_token not in ids:
        raise ValueError("the processor put no image tokens into the prompt; check that it belongs to this model")
    return ids, ImageInputs(
        inputs=inputs,
        token_inputs=per_token,
        is_image=tuple(token == image_token for token in ids),
        spans=image_spans(model, ids, inputs, [picture.size for picture in images]),
        images=tuple(images),
        text=text,
        digest=_digest(inputs),
    )


def blurred(model: HookedModel, found: ImageInputs, *, radius: float = 0.1) -> ImageInputs:
    """The same prompt with Gaussian-blurred images (``radius`` as a share of the longer edge): colours without shapes."""
    from PIL import ImageFilter

    soft = [picture.filter(ImageFilter.GaussianBlur(radius * max(picture.size))) for picture in found.images]
    _, again = process_images(model, found.text, soft)
    return replace(found, inputs=again.inputs, images=again.images, digest=again.digest)


def collate_images(
    records: Sequence[ImageInputs | None],
    offset: Int[Tensor, "batch"],
    like: Int[Tensor, "batch pos"],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The images of several rows as the model takes them together.

    Images stand one after the other in the order of the rows; where some have fewer tiles than others, zeros fill up, as
    the processors themselves do. Token types are 0 at padding and responses.

    Args:
        records: the images of each row, ``None`` for a row without.
        offset: ``[batch]`` padding before each row.
        like: ``[batch, pos]`` token ids: gives shape and device.
        dtype: floating-point type of the model.
    """
    present = [r for r in records if r is not None]
    if not present:
        return {}
    keys = set(present[0].inputs)
    if any(set(r.inputs) != keys for r in present):
        raise ValueError(
            f"records of one batch were made by different processors, which gave {sorted(keys)} and other inputs; "
            "use one processor for all"
        )
    out = {}
    for key in present[0].inputs:
        parts = [r.inputs[key] for r in present]
        biggest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
        joined = torch.cat([_fill_up(part, biggest) for part in parts]).to(like.device)
        out[key] = joined.to(dtype) if joined.is_floating_point() else joined
    for key in present[0].token_inputs:
        types = torch.zeros_like(like)
        for row, (record, start) in enumerate(zip(records, offset.tolist(), strict=True)):
            if record is not None:
                values = torch.tensor(record.token_inputs[key], device=like.device)
                types[row, start : start + len(values)] = values
        out[key] = types
    return out


def _fill_up(part: Tensor, sizes: Sequence[int]) -> Tensor:
    if list(part.shape[1:]) == list(sizes):
        return part
    out = torch.zeros((part.shape[0], *sizes), dtype=part.dtype)
    out[tuple(slice(n) for n in part.shape)] = part
    return out


def _digest(inputs: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(inputs):
        found.update(f"{key}{tuple(inputs[key].shape)}".encode())
        found.update(inputs[key].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
