"""Attributions in a notebook: small, escaped, readable text; template folded; words never glued to special tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl._util import html
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.words import groups_of, spaced
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.tokens.patches import ImageSpan
from tests._util.test_html import HOSTILE, Reader
from tests.helpers.tokenizers import sentencepiece_like, wordpiece_like

CHAT = ["<|im_start|>", "user", "\n", "The", " wait", "er", " <b>", "<|im_end|>", "\n", "<|im_start|>", "assistant"]
IS_CONTENT = [False, False, False, True, True, True, True, False, False, False, False]


def made(tokens: list[str] = CHAT, content: list[bool] = IS_CONTENT, **options: Any) -> Attribution:
    scores = torch.linspace(-1.0, 2.0, len(tokens))
    flags = torch.tensor(content)
    is_image = options.pop("is_image", torch.zeros(len(tokens), dtype=torch.bool))
    return Attribution(scores, tokens, flags, is_image, -0.1, 1.5, 0.2, "integrated_gradients", **options)


def test_an_attribution_shows_its_words_scores_and_responses() -> None:
    a = made(chosen=" great <i>", rejected=" awful")
    found = Reader(a._repr_html_())
    for shown in ("The waiter <b>", "great <i>", "awful", "integrated_gradients", "+1.50", html.signed(-0.1), "nats"):
        assert shown in found.data, shown
    titles = [value for name, value in found.attributes if name == "title"]
    assert f"{html.signed(-0.1)} nats" in titles  # the fourth of eleven scores from -1 to 2
    assert len(a._repr_html_()) < 4000 and "<script" not in a._repr_html_()


@pytest.mark.parametrize(
    ("template", "shown", "hidden"),
    [
        ("fold", ["[3 template tokens]", "[4 template tokens]", "The waiter"], ["assistant"]),
        ("hide", ["The waiter"], ["assistant", "template"]),
        ("show", ["<|im_start|>user", "The waiter", "assistant"], ["template token"]),
    ],
)
def test_the_template_is_folded_hidden_or_shown(template: Any, shown: list[str], hidden: list[str]) -> None:
    text = Reader(str(gr.show_tokens(made(), template=template))).data
    assert all(word in text for word in shown) and not any(word in text for word in hidden)


@pytest.mark.parametrize("hostile", [*HOSTILE, "\x00\u202e\ufeff", "\ud800"])
def test_nothing_in_tokens_or_responses_is_markup(hostile: str) -> None:
    a = made([hostile, " film"], [True, True], chosen=hostile, rejected=hostile)
    for page in (a._repr_html_(), gr.attribution.group(a)._repr_html_(), str(gr.show_tokens([hostile], [1.0]))):
        page.encode()
        found = Reader(page)
        assert set(found.tags) <= {"div", "span", "b"}
        assert {name for name, _ in found.attributes} <= {"style", "title"}


def test_scores_that_are_not_finite_have_no_tint() -> None:
    a = Attribution(
        torch.tensor([float("nan"), 1.0]), ["a", " b"], torch.tensor([True] * 2), torch.tensor([False] * 2),
        None, 1.0, None, "leave_one_out",
    )  # fmt: skip
    assert "nan" not in a._repr_html_()


def test_repr_is_one_line() -> None:
    long = made([" word" * 50] * 300, [True] * 300)
    for shown in (repr(made()), repr(long), repr(gr.attribution.group(long))):
        assert "\n" not in shown and len(shown) < 450
    assert repr(made()).startswith("Attribution(integrated_gradients: f(x) = +1.50 nats, gap -0.10 nats; largest: ")


def test_special_tokens_and_patches_join_no_word() -> None:
    grouped = gr.attribution.group(made())
    assert grouped.texts == ["<|im_start|>", "user", "\n", "The", " waiter", " <b>", *CHAT[7:]]
    tokens = ["<image>"] * 4 + ["Is", " it", "<end>"]
    flags = torch.tensor([True] * 4 + [False] * 3)
    a = made(tokens, [True] * 6 + [False], is_image=flags)
    assert len(gr.attribution.group(a).texts) == 7
    assert gr.attribution.group(a, by="sentence").positions == [(0, 1, 2, 3), (4, 5), (6,)]


@pytest.mark.parametrize("make", [sentencepiece_like, wordpiece_like])
def test_words_of_tokenizers_that_drop_spaces_stay_apart(make: Any) -> None:
    from tests.conftest import tiny_model

    model = tiny_model(tokenizer=make())
    record = gr.PreferencePair("the film was great and the food", " was good", " was bad")
    (tokenized,) = tokenize_pairs(model, [record])
    assert tokenized.responses[0] is not None and tokenized.responses[0].strip() == "was good"
    a = gr.attribute(model, record, method="leave_one_out")
    assert (a.chosen, a.rejected) == tokenized.responses
    assert "the film was great and the food" in Reader(a.as_html()).data
    sentence = gr.attribution.group(a, by="sentence")
    assert any("the film was great and the food" in text for text in sentence.texts)
    phrase = gr.attribution.group(a, by=["was great"])  # found although no token has a space
    assert [t.strip() for t in phrase.texts].count("was great") == 1


def test_patches_are_a_small_picture() -> None:
    tokens = ["<image>"] * 16 + ["what", "is", "it", "?"]
    is_image = torch.tensor([True] * 16 + [False] * 4)
    starts = torch.tensor([True] * 19 + [False])
    a = made(tokens, [True] * 20, is_image=is_image, spans=(ImageSpan(0, 16, 4, 4),), starts_word=starts)
    found = Reader(a._repr_html_())
    assert found.tags.count("i") == 16 and "[16 patches]" in found.data and "what is it?" in found.data
    assert len(a._repr_html_()) < 5000
    huge = made(
        ["<image>"] * 576, [True] * 576, is_image=torch.tensor([True] * 576), spans=(ImageSpan(0, 576, 24, 24),)
    )
    assert len(huge._repr_html_()) < 5000 and "24 x 24 patches" in huge._repr_html_()


def test_spaces_are_put_only_where_none_is() -> None:
    assert "".join(spaced(["a", " b", "c", "\n", "d"], [True, True, False, False, True])) == "a bc\nd"
    assert groups_of(["a", "b"], [True, True], ["a b"]) == [(0, 1)]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="template='all'"):
        gr.show_tokens(made(), template="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="renderer='d3'"):
        gr.show_tokens(made(), renderer="d3")  # type: ignore[arg-type]
