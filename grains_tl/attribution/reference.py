"""The other end of the path: what a prompt without information looks like in embedding space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl.hooks.mask import replacement_embedding
from grains_tl.hooks.stand_ins import ImageMasker, replacements
from grains_tl.models.precision import full_precision
from grains_tl.models.running import device_of, embed_tokens
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel

#: ``zero``, ``mean_embedding`` (of the vocabulary), ``eos``, ``pad``, ``mask``: the same vector at every position.
#: ``uniform_prompt``: the prompt's own mean embedding at every position: the same words, but not which is where.
#: ``neutral``: at every position the function word or punctuation mark that is nearest (cosine) to the token there.
BASELINES = ("zero", "mean_embedding", "eos", "pad", "mask", "uniform_prompt", "neutral")

#: What expected gradients average over unless told otherwise.
DEFAULT_SET = ("mean_embedding", "uniform_prompt", "neutral")

#: Words without an opinion; those that the tokenizer writes as one token are used.
NEUTRAL = (
    "the a an of to and in is it that was for on with as at by this from be are were or which there what than then"
)


PUNCTUATION = (".", ",", ":", ";", "?", "!", "-")

#: A name, one vector for every position, or (expected gradients) several of them.
Baseline = str | Tensor | Sequence[str | Tensor]


def require_baseline(model: HookedModel, baseline: Baseline) -> None:
    """Refuse a baseline that this model's tokenizer cannot give (ValueError)."""
    for one in [baseline] if isinstance(baseline, (str, Tensor)) else baseline:
        Baselines(model).point(one, torch.zeros(1, int(model.cfg.d_model)))


def check_baseline(baseline: Baseline, *, several: bool = False) -> None:
    """Refuse an unknown baseline, or a list where one is needed (ValueError)."""
    if not isinstance(baseline, (str, Tensor)):
        if not several or not len(baseline):
            raise ValueError(f"baseline={baseline!r}; several baselines are for method='expected_gradients'")
        for one in baseline:
            check_baseline(one)
    elif isinstance(baseline, str) and baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}; it is one of {BASELINES} or a [d_model] vector")


class Baselines:
    """Baseline points of one model; the vocabulary is read once for all records."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._vectors: dict[str, Tensor] = {}

    def point(self, baseline: str | Tensor, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """x' for a text prompt's real embeddings ``x``."""
        if isinstance(baseline, Tensor):
            if baseline.shape not in (x.shape, x.shape[-1:]):
                raise ValueError(
                    f"the baseline has shape {tuple(baseline.shape)}; the embeddings have {tuple(x.shape)}"
                )
            return baseline.detach().to(x).expand_as(x).clone()
        if baseline == "uniform_prompt":
            return x.mean(0, keepdim=True).expand_as(x).clone()
        if baseline == "neutral":
            words = self._neutral()
            with full_precision(self.model):
                nearest = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T
            return words[nearest.argmax(-1)]
        if baseline not in self._vectors:
            self._vectors[baseline] = replacement_embedding(self.model, baseline).float().cpu()
        return self._vectors[baseline].expand_as(x).clone()

    def of_record(
        self, baseline: str | Tensor, x: Float[Tensor, "pos d_model"], record: TokenizedPair, image_masker: ImageMasker
    ) -> Float[Tensor, "pos d_model"]:
        """x' for a record: ``point``, with stand-ins of the image's own at its patches (zeros for the zero baseline)."""
        found = self.point(baseline, x)
        if record.images is None or isinstance(baseline, Tensor):
            return found
        how: ImageMasker = "zero" if baseline == "zero" else image_masker
        stand_ins = replacements(self.model, [record], "zero", how).of(0)
        return torch.where(torch.tensor(record.is_image)[:, None], stand_ins, found)

    def default(self) -> str:
        """``neutral``, or the mean embedding where the tokenizer has no word for it."""
        return "neutral" if neutral_tokens(self.model) else "mean_embedding"

    def _neutral(self) -> Float[Tensor, "word d_model"]:
        if "neutral" not in self._vectors:
            words = neutral_tokens(self.model)
            if not words:
                raise ValueError(
                    "baseline 'neutral': the tokenizer writes no English function word as one token; use another one"
                )
            ids = torch.tensor([words], device=device_of(self.model))
            self._vectors["neutral"] = embed_tokens(self.model, ids)[0].float().cpu()
        return self._vectors["neutral"]


def neutral_tokens(model: HookedModel) -> list[int]:
    """Ids of the function words and punctuation marks that the tokenizer writes as one token."""
    special = token_rules(model).special
    texts = [f" {word}" for word in NEUTRAL.split()] + list(PUNCTUATION)
    encoded = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    known = special | {getattr(model.tokenizer, "unk_token_id", None)}
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] not in known})
