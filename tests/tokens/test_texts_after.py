"""What tokens add to a text, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from grains_tl.tokens.text import decode_after, texts_after


class Bytes:
    """A tokenizer of bytes: most characters are several tokens."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["a é b", "\N{PARTY POPPER}!", "no \N{SNOWMAN}"])
def test_characters_of_several_tokens_are_whole(text: str) -> None:
    before, new = list(b"so "), list(text.encode())
    pieces = texts_after(Bytes(), before, new)
    assert len(pieces) == len(new) and "".join(pieces) == text == decode_after(Bytes(), before, new)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_as_far_as_it_goes() -> None:
    new = "\N{SNOWMAN}".encode()[:2]
    assert "".join(texts_after(Bytes(), [], list(new))) == decode_after(Bytes(), [], list(new)) != ""


def test_words_keep_their_spaces(bridge: Any) -> None:
    before, new = (bridge.tokenizer(t)["input_ids"] for t in ("the film", "was good and"))
    assert texts_after(bridge.tokenizer, before, new) == [" was", " good", " and"]
