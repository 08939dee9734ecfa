"""A direction for a word: through the unembedding, or through a Jacobian lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.models.identity import model_identity
from grains_tl.models.jacobian_lens import load_lens
from grains_tl.models.running import require_layers
from grains_tl.types import HookedModel
from grains_tl.vectors.foreign import with_resid_norms
from grains_tl.vectors.manifest import package_versions
from grains_tl.vectors.steering_vectors import SteeringVectors
from grains_tl.vectors.words import token_directions


def word_vectors(
    model: HookedModel,
    words: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    *,
    against: str | Sequence[str] = (),
    lens: Any = None,
) -> SteeringVectors:
    """Directions that raise a word's logit: those of the unembedding, or of a Jacobian lens. No records are needed.

    Without a lens it is the direction along which the final norm and the unembedding raise the word above the vocabulary's
    mean. It belongs to the output of the last block; at another layer it is the same direction, on the assumption of a
    logit lens that later blocks leave it as it is. With a lens it is ``lens.lens_vectors``, the row of ``W_U J`` for the
    word, which says how that layer acts on the output on average. In both, layer l is the output of block l, from 0.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``; with a lens a ``TransformerBridge`` of TransformerLens 4.3.
        words: one or several, each a single token. Tokenizers write a word inside a sentence with a space: ``" good"``.
        layers: default the last block's output, or with a lens all that it was fitted for.
        against: words whose directions are taken off, such as ``" bad"``.
        lens: a ``transformer_lens.tools.analysis.JacobianLens``, or a file with one.

    Returns:
        ``SteeringVectors``: the mean of the words' unit directions less that of the words they are against, with the
        residual norms of the model. ``info["tokens"]`` and ``info["against"]`` are the token ids.

    Raises:
        ImportError: a lens file without TransformerLens 4.3.
        OptionError: no words, a word of several tokens, words that cancel, a layer the lens was not fitted for.
        ValueError: a layer the model lacks, a lens of another model.

    Examples:
        >>> vectors = word_vectors(model, " great", 21, against=" awful")                          # doctest: +SKIP
        >>> vectors = word_vectors(model, " great", 21, lens="lens.pt")                            # doctest: +SKIP
    """
    plus, minus = single_tokens(model, words, "words"), single_tokens(model, against, "against")
    if not plus:
        raise OptionError("words is empty; expected at least one word of a single token, such as ' good'")
    fitted = load_lens(lens) if isinstance(lens, (str, Path)) else lens
    numbers = _layers(model, layers, fitted)
    tokens = [*plus.values(), *minus.values()]
    if fitted is None:
        rows = token_directions(model, tokens)[None].expand(len(numbers), -1, -1)
    else:
        found = [fitted.lens_vectors(model, tokens, layer).detach().float().cpu() for layer in numbers]
        rows = torch.stack(found)
    raw = _difference(rows, len(plus))
    small = [layer for layer, row in zip(numbers, raw, strict=True) if float(row.norm()) < 1e-4]
    if small:
        raise OptionError(f"the directions of {list(plus)} and {list(minus)} cancel at layers {small}")
    info = {
        "method": "unembedding" if fitted is None else "Jacobian lens",
        "model": model_identity(model, bare=True),
        "words": list(plus),
        "against_words": list(minus),
        "tokens": list(plus.values()),
        "against": list(minus.values()),
        "layer_convention": "layer l is the output of block l, from 0",
        "versions": package_versions(),
    }
    if fitted is not None:
        info["lens"] = {"n_prompts": int(getattr(fitted, "n_prompts", 0)), "d_model": int(raw.shape[1])}
    return with_resid_norms(SteeringVectors.from_raw(raw, numbers, torch.zeros(len(numbers)), info), model)


def single_tokens(model: HookedModel, words: str | Sequence[str], name: str) -> dict[str, int]:
    """Token ids by word; OptionError for a word that is not one token."""
    ids: dict[str, int] = {}
    for word in [words] if isinstance(words, str) else words:
        if not isinstance(word, str) or not word:
            raise OptionError(f"{name} has {word!r}; expected a word as text")
        pieces = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            shown = [model.tokenizer.decode([piece]) for piece in pieces]
            other = word.strip() if word != word.strip() else f" {word}"
            raise OptionError(
                f"{name}: {word!r} is {len(pieces)} tokens here ({shown}); expected a single one, which has a direction of "
                f"its own. Try {other!r}, or a part of it"
            )
        ids[word] = int(pieces[0])
    return ids


def _layers(model: HookedModel, layers: int | Sequence[int] | None, lens: Any) -> list[int]:
    n_layers = int(model.cfg.n_layers)
    if layers is None:
        return [n_layers - 1] if lens is None else list(lens.source_layers)
    numbers = require_layers(model, [layers] if isinstance(layers, int) else list(layers))
    missing = [] if lens is None else [layer for layer in numbers if layer not in lens.source_layers]
    if missing:
        raise OptionError(
            f"the lens was not fitted for layers {missing}; it has {list(lens.source_layers)} (outputs of blocks, from 0; "
            "never the last block, whose output the unembedding reads directly: leave the lens out there)"
        )
    return numbers


def _difference(rows: Float[Tensor, "layer token d_model"], n_plus: int) -> Float[Tensor, "layer d_model"]:
    """The mean of the first rows less that of the others, each at unit length."""
    unit = rows / rows.norm(dim=-1, keepdim=True)
    plus, minus = unit[:, :n_plus].mean(1), unit[:, n_plus:]
    return plus - minus.mean(1) if minus.shape[1] else plus
