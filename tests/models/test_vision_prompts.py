"""Where images stand in a prompt, how many, of which sizes: seven families against their own processor and plain model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from tests.helpers.vision_families import picture
from tests.models.test_vision_families import CHOSEN, REJECTED, TOLERANCE, family, placeholder  # noqa: F401, a fixture

WIDE, TALL, SMALL = (lambda: picture(0)), (lambda: picture(1, 24, 40)), (lambda: picture(2, 16, 16))

#: Text with {} where an image stands, and the images in their order.
TEXTS: dict[str, tuple[str, list[Any]]] = {
    "image after text": ("question : what is this ? {} answer :", [WIDE]),
    "image at the end": ("question : what is this ? {}", [TALL]),
    "two images in a row": ("{} {} question : what is this ? answer :", [WIDE, TALL]),
    "two images with text between": ("what is this {} and this {} ? answer :", [WIDE, SMALL]),
    "three images of one size": ("{} this and {} that {} answer :", [SMALL, SMALL, SMALL]),
}

#: Conversations: the content of the user's turn, and the images in their order.
TURNS: dict[str, tuple[list[str | None], list[Any]]] = {
    "image first": ([None, "what is this ?"], [WIDE]),
    "image last": (["what is this ?", None], [TALL]),
    "two images with text between": (["what is", None, "and", None, "?"], [WIDE, SMALL]),
    "two images in a row": ([None, None, "what is this ?"], [TALL, WIDE]),
}


def plain_logprobs(family: SimpleNamespace, text: str, images: list[Any]) -> tuple[Tensor, list[int]]:  # noqa: F811
    """Log-probability of both responses from the plain model, and the ids of the prompt."""
    out, prompt = [], []
    for response in (CHOSEN, REJECTED):
        inputs = family.processor(
            text=[text + response], images=[images], add_special_tokens=False, return_tensors="pt"
        )
        n = len(family.processor.tokenizer(response, add_special_tokens=False)["input_ids"])
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logprobs = family.hf(**inputs).logits[0, :-1].log_softmax(-1)
        out.append(logprobs.gather(1, ids[1:, None])[-n:].sum())
        prompt = ids[:-n].tolist()
    return torch.stack(out), prompt


def expect_same(family: SimpleNamespace, record: gr.PreferencePair, text: str, images: list[Any]) -> None:  # noqa: F811
    wanted, ids = plain_logprobs(family, text, images)
    tokenized = gr.tokens.tokenize_pairs(family.model, [record])[0]
    assert list(tokenized.prompt) == ids
    assert tokenized.images is not None
    spans = tokenized.images.spans
    assert sorted({span.image for span in spans}) == list(range(len(images)))
    assert [span.image for span in spans] == sorted(span.image for span in spans)
    token = family.hf.config.image_token_id
    places = [p for span in spans for p in range(span.start, span.start + span.length)]
    # LLaVA-OneVision ends each of several images with a separator, which is no patch
    separators = len(images) if family.name == "LLaVA-OneVision" and len(images) > 1 else 0
    others = sorted({p for p, i in enumerate(ids) if i == token} - set(places))
    assert len(places) == len(set(places)) and len(others) == separators
    torch.testing.assert_close(gr.score_pairs(family.model, [tokenized])[0], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", TEXTS)
def test_places_in_a_text(family: SimpleNamespace, case: str) -> None:  # noqa: F811
    words, made = TEXTS[case]
    images = [make() for make in made]
    text = words.format(*[placeholder(family)] * len(images))
    expect_same(family, gr.PreferencePair(text, CHOSEN, REJECTED, image=images), text, images)


@pytest.mark.parametrize("case", TURNS)
def test_places_in_a_chat_template(family: SimpleNamespace, case: str) -> None:  # noqa: F811
    parts, made = TURNS[case]
    images = [make() for make in made]
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    messages = [{"role": "user", "content": content}]
    text = family.processor.apply_chat_template(messages, add_generation_prompt=True)
    expect_same(
        family, gr.PreferencePair(messages, CHOSEN.strip(), REJECTED.strip(), image=images), text.rstrip(), images
    )


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (16, 16), (64, 16), (90, 90)])
def test_grids_follow_the_processor(family: SimpleNamespace, size: tuple[int, int]) -> None:  # noqa: F811
    image = picture(3, *size)
    text = f"{placeholder(family)} what is this ?"
    ids = family.processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    tokenized = gr.tokens.tokenize_pairs(family.model, [gr.PreferencePair(text, CHOSEN, REJECTED, image=image)])[0]
    assert tokenized.images is not None
    assert sum(span.length for span in tokenized.images.spans) == int((ids == family.hf.config.image_token_id).sum())


def test_the_order_of_images_matters(family: SimpleNamespace) -> None:  # noqa: F811
    text = "what is this {} and this {} ? answer :".format(*[placeholder(family)] * 2)
    a, b = picture(0), picture(5)
    records = [gr.PreferencePair(text, CHOSEN, REJECTED, image=images) for images in ([a, b], [b, a])]
    scores = gr.score_pairs(family.model, records)
    assert (scores[0] - scores[1]).abs().max() > 10 * TOLERANCE
    attributions = gr.attribute(family.model, records[0], method="gradient_x_input")
    assert bool(attributions.is_image.any()) and attributions.scores[attributions.is_image].isfinite().all()
