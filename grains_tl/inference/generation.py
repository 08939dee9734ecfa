"""Continuing text under hooks, the same for both model classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from grains_tl._util.checks import finite, whole
from grains_tl._util.errors import OptionError, numbered
from grains_tl.inference.batches import image_inputs, pad_rows, prompt_key
from grains_tl.models.hugging_face import plain_decoding
from grains_tl.models.plain_blocks import plain_blocks, runs_plain
from grains_tl.models.precision import finite_hook
from grains_tl.models.prompt_cache import require_filled
from grains_tl.models.running import hooked, is_bridge, listed_hooks, require_hook_names, resid_post
from grains_tl.models.state import require_ready
from grains_tl.records.pairs import prompt_list
from grains_tl.tokens.images import ImageInputs
from grains_tl.tokens.prompts import prompt_inputs
from grains_tl.tokens.rules import token_rules
from grains_tl.tokens.text import decode_after
from grains_tl.types import FwdHooks, HookedModel, PromptHooks, Text

#: Steering, hooks, or a function that makes hooks from the prompt's length.
GenerationHooks = FwdHooks | PromptHooks | Callable[[int], FwdHooks]


@dataclass(frozen=True, eq=False)
class Continued:
    """A prompt and how it was continued.

    Attributes:
        prompt: token ids.
        images: what the processor made of its images.
        new: the tokens generated, one that ended the text among them.
        n_shown: how many of these are text: all, or all but the one that ended it.
    """

    prompt: list[int]
    images: ImageInputs | None
    new: list[int]
    n_shown: int

    def text(self, model: HookedModel) -> str:
        """The new text, special tokens left out."""
        return decode_after(model.tokenizer, self.prompt, self.new[: self.n_shown])


def generate(
    model: HookedModel,
    prompts: Text | Iterable[Text],
    fwd_hooks: GenerationHooks | None = None,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    images: Sequence[Any] | None = None,
) -> list[str]:
    """Continue prompts with hooks active at every step.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        prompts: texts or conversations (rendered with the chat template); one alone stands for a list of one. A
            conversation that ends with the assistant's words is continued there.
        fwd_hooks: a ``Steering``, hooks ``[(name, fn)]``, or a function ``prompt_len -> hooks`` for hooks of your own
            that need the prompt's length (of the batch, padding included).
        max_new_tokens: longest continuation.
        temperature: 0 for greedy decoding, else sampling.
        seed: for sampling; the global random state is left as it was.
        batch_size: prompts per batch; they are padded left.
        images: for vision-language models, one entry per prompt: an image, a list of images, or ``None`` (see
            ``PreferencePair``).

    Returns:
        The new text of each prompt, special tokens left out; put behind the prompt it gives the whole text, so it keeps
        the space between them.

    Raises:
        ValueError: no prompts, an empty or too long one, not as many images as prompts, ``max_new_tokens < 1``, or a
            model that is not ready (``require_ready``); during the run, NaN or inf after the last block.

    Examples:
        >>> generate(model, ["The film was"], vectors.hooks(0.2, layers=[15]), max_new_tokens=10)  # doctest: +SKIP
    """
    continued = continue_prompts(
        model,
        prompts,
        fwd_hooks,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        images=images,
    )
    return [one.text(model) for one in continued]


def continue_prompts(
    model: HookedModel,
    prompts: Text | Iterable[Text],
    fwd_hooks: GenerationHooks | None = None,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    images: Sequence[Any] | None = None,
) -> list[Continued]:
    """``generate`` with the token ids of prompts and continuations, for a caller that goes on with them."""
    max_new_tokens, batch_size = whole("max_new_tokens", max_new_tokens), whole("batch_size", batch_size)
    temperature, seed = finite("temperature", temperature), whole("seed", seed)
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}; expected at least 1")
    if temperature < 0:
        raise OptionError(f"temperature={temperature}; expected 0 (greedy) or a positive number")
    require_ready(model)
    encoded = encode_prompts(model, prompts, images)
    longest, n_ctx = max(len(ids) for ids, _ in encoded), int(model.cfg.n_ctx)
    if longest + max_new_tokens > n_ctx:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are too many, the model's context holds "
            f"{n_ctx}; shorten one of them"
        )
    continued: list[Continued] = []
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        # every batch has a seed of its own, far from those of the next seeds: copies of a prompt must not repeat
        continued += _continue(model, rows, fwd_hooks, max_new_tokens, temperature, seed * 1_000_003 + start)
    return continued


def encode_prompts(
    model: HookedModel, prompts: Text | Iterable[Text], images: Sequence[Any] | None = None
) -> list[tuple[list[int], ImageInputs | None]]:
    """Token ids and images of each prompt.

    Raises:
        ValueError: no prompts, an empty or too long one (named by its number), not as many images as prompts.
    """
    prompts = prompt_list(prompts)
    if not prompts:
        raise ValueError("no prompts; give at least one")
    if images is not None and (isinstance(images, str) or not hasattr(images, "__iter__")):
        raise ValueError(
            f"images is a {type(images).__name__}; expected a list with one entry per prompt: images=[image]"
        )
    images = [None] * len(prompts) if images is None else list(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(images)} images; give one entry per prompt (None for none)")
    encoded = []
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True), start=1):
        with numbered("prompt", number):
            encoded.append(prompt_inputs(model, prompt, image))
    return encoded


def _continue(
    model: HookedModel,
    rows: list[tuple[list[int], ImageInputs | None]],
    fwd_hooks: GenerationHooks | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Continued]:
    # A prompt of one token would look like a decoding step to a hook: it gets a (masked) position of padding.
    ids, mask, offset = pad_rows(model, [row for row, _ in rows], padding_side="left", at_least=2)
    pictures = image_inputs(model, [images for _, images in rows], ids, offset)
    prompt_len = ids.shape[1]
    hooks = [
        *hooks_at(fwd_hooks, prompt_len, [prompt_key(*row) for row in rows]),
        *finite_hook(resid_post(int(model.cfg.n_layers) - 1)),
    ]
    require_hook_names(model, hooks)
    rules = token_rules(model)
    sampling: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {}
    plain = runs_plain(model)
    with torch.no_grad(), torch.random.fork_rng(), hooked(model, hooks):
        torch.manual_seed(seed)
        if is_bridge(model):
            if sampling:
                sampling |= {"top_k": 0, "top_p": 1.0}
            decoding = plain_decoding(model.original_model, rules.eos, rules.pad)
            with plain_blocks(model) if plain else nullcontext(), decoding as end_ids:
                written = model.original_model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    **pictures,
                    max_new_tokens=max_new_tokens,
                    do_sample=bool(sampling),
                    return_dict_in_generate=True,
                    **sampling,
                )
            require_filled(written)
            out = written["sequences"]
        else:
            end_ids = [rules.eos]
            out = model.generate(
                ids,
                max_new_tokens=max_new_tokens,
                stop_at_eos=True,
                eos_token_id=rules.eos,
                padding_side="left",
                verbose=False,
                do_sample=bool(sampling),
                **sampling,
            )
    continued = []
    for (prompt, images), row in zip(rows, out, strict=True):
        new = row[prompt_len:].tolist()
        end = next((i for i, token in enumerate(new) if token in end_ids), len(new))
        continued.append(Continued(prompt, images, new[: end + 1], end))
    return continued


def hooks_at(fwd_hooks: GenerationHooks | None, prompt_len: int, prompts: Sequence[tuple[int | str, ...]]) -> FwdHooks:
    """The hooks of a batch whose prompts all end at one place, padding in front included."""
    if isinstance(fwd_hooks, PromptHooks):
        return fwd_hooks.for_prompt(prompt_len, prompts)
    return listed_hooks(fwd_hooks(prompt_len) if callable(fwd_hooks) else fwd_hooks)
