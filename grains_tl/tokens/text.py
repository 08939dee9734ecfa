"""Plain text to token ids and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from grains_tl.tokens.rules import TokenRules


class TokenTexts:
    """The texts of single tokens and of neighbours, each decoded once: records share most of theirs.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._texts = tokenizer, {}  # type: ignore[var-annotated]

    def strings(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Every token decoded by itself."""
        return tuple(self._text((token,)) for token in ids)

    def word_starts(self, ids: Sequence[int]) -> tuple[bool, ...]:
        """Where decoding puts a space before a token: some tokenizers hide it when the token is decoded alone."""
        starts = [True]
        for before, this in itertools.pairwise(ids):
            n = len(self._text((before,)))
            starts.append(self._text((before, this))[n : n + 1].isspace())
        return tuple(starts[: len(ids)])

    def _text(self, ids: tuple[int, ...]) -> str:
        text = self._texts.get(ids)
        if text is None:
            text = self._texts[ids] = str(self._tokenizer.decode(list(ids)))
        return text


def encode(
    tokenizer: Any, rules: TokenRules, text: str, *, rendered: bool = False
) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Ids of a text, and the characters of each where the tokenizer knows them.

    Args:
        tokenizer: of the model.
        rules: its ``TokenRules``.
        text: the text.
        rendered: it comes out of a chat template, which writes its own first tokens.

    Returns:
        The ids, and ``(first, last + 1)`` characters of each token; ``None`` for a slow tokenizer.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = list(encoding["input_ids"])
    offsets = list(encoding["offset_mapping"]) if fast else None
    front = () if rendered else rules.front
    if front and tuple(ids[: len(front)]) != front:
        ids = [*front, *ids]
        offsets = None if offsets is None else [*[(0, 0)] * len(front), *offsets]
    return ids, offsets


def decode_after(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens where they stand: the whole text without that of the tokens before.

    Decoded alone, they would lose their first space with SentencePiece and WordPiece tokenizers.

    Args:
        tokenizer: of the model.
        before: ids in front of them.
        new: ids to decode; special tokens are left out.
    """
    start = tokenizer.decode(list(before), skip_special_tokens=True)
    whole = tokenizer.decode([*before, *new], skip_special_tokens=True)
    if whole.startswith(start):
        return str(whole[len(start) :])
    return str(tokenizer.decode(list(new), skip_special_tokens=True))  # a character is split between the two


def texts_after(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> list[str]:
    """What each new token adds to the text; together they are ``decode_after`` of all of them.

    A character that several tokens share is given to the last of them, and the others add nothing.

    Args:
        tokenizer: of the model.
        before: ids in front of them.
        new: ids to decode.
    """
    texts, shown = [], ""
    for n in range(1, len(new) + 1):
        whole = decode_after(tokenizer, before, new[:n])
        unfinished = whole.endswith("\N{REPLACEMENT CHARACTER}") and n < len(new)
        # decoders that tidy up may change what was there before; the token's own text is then the best there is
        added = whole[len(shown) :] if whole.startswith(shown) else str(tokenizer.decode([new[n - 1]]))
        texts.append("" if unfinished else added)
        shown = shown if unfinished else whole
    return texts


def last_tokens(tokenizer: Any, text: str, n: int) -> str:
    """The end of a text that its last ``n`` tokens cover.

    Cut out of the text itself where the tokenizer knows the characters of its tokens: decoding loses spaces and parts of
    characters.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    if fast:
        return text[encoding["offset_mapping"][-n][0] :]
    return str(tokenizer.decode(encoding["input_ids"][-n:]))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
