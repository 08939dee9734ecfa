"""The other end of the path: what a prompt without information looks like in embedding space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.hooks.mask import ImageMasker, Mask, replacement_embedding
from grains_tl.hooks.stand_ins import replacements
from grains_tl.models.precision import full_precision
from grains_tl.models.running import device_of, embed_tokens
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel

#: ``zero``, ``mean_embedding`` (of the vocabulary), ``eos``, ``pad``, ``mask``: the same vector at every position.
#: ``uniform_prompt``: the prompt's own mean embedding at every position: the same words, but not which is where.
#: ``function_words``: at every position the function word or punctuation mark that is nearest (cosine) to the token there.
REFERENCES = ("zero", "mean_embedding", "eos", "pad", "mask", "uniform_prompt", "function_words")
#: What ``function_words`` was called in release 0.1; checkpoints have this name.
OLD_NAME = "neutral"

#: What expected gradients average over unless told otherwise.
DEFAULT_SET = ("mean_embedding", "uniform_prompt", "function_words")

#: Words without an opinion; those that the tokenizer writes as one token are used.
NEUTRAL = (
    "the a an of to and in is it that was for on with as at by this from be are were or which there what than then"
)


PUNCTUATION = (".", ",", ":", ";", "?", "!", "-")

#: A name, one vector for every position, or (expected gradients) several of them.
Reference = str | Tensor | Sequence[str | Tensor]


def require_reference(model: HookedModel, reference: Reference) -> None:
    """Refuse a reference that this model's tokenizer cannot give (ValueError)."""
    for one in [reference] if isinstance(reference, (str, Tensor)) else reference:
        References(model).point(one, torch.zeros(1, int(model.cfg.d_model)))


def check_reference(reference: Reference | None, *, several: bool = False) -> None:
    """Refuse an unknown reference, or a list where one is needed (ValueError); ``None`` is the default of the method."""
    if reference is None:
        return
    if not isinstance(reference, (str, Tensor)):
        if not several or not len(reference):
            raise ValueError(
                f"reference={reference!r} is a list; only expected_gradients takes several references, and at least one"
            )
        for one in reference:
            check_reference(one)
    elif isinstance(reference, str) and reference not in (*REFERENCES, OLD_NAME):
        raise ValueError(f"reference={reference!r} is not known; expected one of {', '.join(REFERENCES)}, or a vector")


class References:
    """The reference points of one model; the vocabulary is read once for all records."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._vectors: dict[str, Tensor] = {}

    def point(self, reference: str | Tensor, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """x' for a text prompt's real embeddings ``x``."""
        if isinstance(reference, Tensor):
            if reference.shape not in (x.shape, x.shape[-1:]):
                raise ValueError(
                    f"the reference has shape {tuple(reference.shape)}; expected {tuple(x.shape)} or {tuple(x.shape[-1:])}"
                )
            return reference.detach().to(x).expand_as(x).clone()
        if reference == "uniform_prompt":
            return x.mean(0, keepdim=True).expand_as(x).clone()
        if reference in ("function_words", OLD_NAME):
            words = self._function_words()
            with full_precision(self.model):
                nearest = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T
            return words[nearest.argmax(-1)]
        if reference not in self._vectors:
            self._vectors[reference] = replacement_embedding(self.model, reference).float().cpu()
        return self._vectors[reference].expand_as(x).clone()

    def of_record(
        self, reference: str | Tensor, x: Float[Tensor, "pos d_model"], record: TokenizedPair, image: ImageMasker
    ) -> Float[Tensor, "pos d_model"]:
        """x' for a record: ``point``, with stand-ins of the image's own at its patches (zeros for the zero reference)."""
        found = self.point(reference, x)
        if record.images is None or isinstance(reference, Tensor):
            return found
        how: ImageMasker = "zero" if reference == "zero" else image
        stand_ins = replacements(self.model, [record], Mask("zero", how)).of(0)
        return torch.where(torch.tensor(record.is_image)[:, None], stand_ins, found)

    def default(self) -> str:
        """``function_words``, or the mean embedding where the tokenizer has no word for it."""
        return "function_words" if neutral_tokens(self.model) else "mean_embedding"

    def _function_words(self) -> Float[Tensor, "word d_model"]:
        if "function_words" not in self._vectors:
            words = neutral_tokens(self.model)
            if not words:
                raise ValueError(
                    "reference='function_words' needs a tokenizer with English function words as single tokens, "
                    "and this one has none; use another reference, such as 'mean_embedding'"
                )
            ids = torch.tensor([words], device=device_of(self.model))
            self._vectors["function_words"] = embed_tokens(self.model, ids)[0].float().cpu()
        return self._vectors["function_words"]


def neutral_tokens(model: HookedModel) -> list[int]:
    """Ids of the function words and punctuation marks that the tokenizer writes as one token."""
    special = token_rules(model).special
    texts = [f" {word}" for word in NEUTRAL.split()] + list(PUNCTUATION)
    encoded = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    known = special | {getattr(model.tokenizer, "unk_token_id", None)}
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] not in known})
