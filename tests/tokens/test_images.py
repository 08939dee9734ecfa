"""Images through the package on the tiny vision-language model: reading, choosing, masking, resuming, drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import grains_tl as gr
from grains_tl.attribution.result import Attribution
from grains_tl.hooks.stand_ins import prompt_embeddings, replacements
from grains_tl.plotting.hallucination import plot_captions
from grains_tl.plotting.images import attribution_share, plot_image_attribution
from grains_tl.records.pictures import load_images
from grains_tl.tokens.images import ImageInputs, collate_images
from grains_tl.tokens.patches import ImageSpan
from tests.helpers.vision_families import FAMILIES, bridge, build, picture

PROMPT = "question : what is this ? answer :"


@pytest.fixture(scope="module")
def llava() -> Any:
    return bridge(FAMILIES[0])


def pair(image: Any = None, prompt: Any = PROMPT) -> gr.PreferencePair:
    return gr.PreferencePair(prompt=prompt, chosen=" a cat", rejected=" a big dog", image=image)


def test_every_form_of_an_image_is_the_same_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        pixels / 255.0,
        torch.tensor(pixels),
        torch.tensor(pixels).permute(2, 0, 1),
        np.dstack([pixels, np.full((6, 9), 255, dtype=np.uint8)]),
    ]
    for found in load_images(forms):
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), pixels)
    grey = load_images(pixels[:, :, 0])[0]
    assert np.array_equal(np.asarray(grey), np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ([], ValueError, "empty list"),
        ("no such file.png", FileNotFoundError, "not a file"),
        (np.zeros((2, 3, 7)), ValueError, "height, width"),
        (np.zeros(4), ValueError, "height, width"),
        (np.full((2, 2, 3), 300.0), ValueError, "0 to 1"),
        (np.full((2, 2, 3), np.nan), ValueError, "0 to 1"),
        (object(), ValueError, "a PIL image, a path, or an array"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_images(image)


def test_a_model_that_cannot_take_an_image_says_so(llava: Any, bridge: Any) -> None:
    with pytest.raises(ValueError, match="record 1: the model takes no images"):
        gr.tokens.tokenize_pairs(bridge, [pair(picture(0))])
    processor = llava.processor
    try:
        llava.processor = None
        with pytest.raises(ValueError, match="no processor.*AutoProcessor"):
            gr.tokens.tokenize_pairs(llava, [pair(picture(0))])
    finally:
        llava.processor = processor


def test_placeholders(llava: Any) -> None:
    ids = [gr.tokens.tokenize_pairs(llava, [pair(picture(0), p)])[0].prompt for p in (PROMPT, f"<image>\n{PROMPT}")]
    assert ids[0] == ids[1]
    after = gr.tokens.tokenize_pairs(llava, [pair(picture(0), "question : <image> what is this ?")])[0]
    assert after.images is not None and after.images.spans[0].start == 2
    with pytest.raises(ValueError, match="2 placeholders '<image>' for 1 image"):
        gr.tokens.tokenize_pairs(llava, [pair(picture(0), f"<image> <image> {PROMPT}")])
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "what is"}, {"type": "image"}, {"type": "text", "text": "this ?"}],
        }
    ]
    record = gr.tokens.tokenize_pairs(llava, [gr.PreferencePair(parts, "a cat", "a dog", image=picture(0))])[0]
    assert [t for t, c in zip(record.strings, record.content, strict=True) if c] == [
        "what",
        "is",
        *["<image>"] * 16,
        "this",
        "?",
    ]
    with pytest.raises(ValueError, match=r"1 image part\(s\) for 2"):
        gr.tokens.tokenize_pairs(llava, [gr.PreferencePair(parts, "a cat", "a dog", image=[picture(0)] * 2)])


def test_text_alone_on_a_vision_model(llava: Any) -> None:
    record = gr.tokens.tokenize_pairs(llava, [pair()])[0]
    assert record.images is None and not any(record.is_image)
    found = gr.attribute(llava, pair(), method="gradient_x_input")
    assert not found.is_image.any() and found.spans == ()
    words = gr.tokens.tokenize_pairs(
        llava, [gr.PreferencePair([{"role": "user", "content": "what is this ?"}], "a cat", "a dog")]
    )[0]
    assert [t for t, c in zip(words.strings, words.content, strict=True) if c] == ["what", "is", "this", "?"]


def test_rows_of_fewer_tiles_are_filled_with_zeros() -> None:
    made = [
        ImageInputs(
            inputs={"pixel_values": torch.ones(1, n, 3, 2, 2), "n": torch.tensor([n])},
            token_inputs={"t": (1,) * n},
            is_image=(True,) * n,
            spans=(),
            images=(),
            text="",
            digest="",
        )
        for n in (1, 3)
    ]
    like = torch.zeros(3, 5, dtype=torch.long)
    found = collate_images([made[0], None, made[1]], torch.tensor([0, 0, 2]), like, torch.float64)
    assert found["pixel_values"].shape == (2, 3, 3, 2, 2) and found["pixel_values"].dtype == torch.float64
    assert found["pixel_values"].sum(dim=(1, 2, 3, 4)).tolist() == [12, 36]
    assert found["n"].tolist() == [1, 3]
    assert found["t"].tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0, 0, 1, 1, 1]]


def attribution(scores: list[float], is_image: list[bool]) -> Attribution:
    n = len(scores)
    names = ["<image>" if i else f" w{p}" for p, i in enumerate(is_image)]
    spans = (ImageSpan(0, sum(is_image), 1, sum(is_image)),)
    flags, content = torch.tensor(is_image), torch.ones(n, dtype=torch.bool)
    return Attribution(torch.tensor(scores), names, content, flags, None, 1.0, None, "leave_one_out", spans=spans)


def test_words_and_patches_have_budgets_of_their_own() -> None:
    a = attribution([5.0, 4.0, -3.0, 1.0, 2.0, -1.0], [True, True, True, False, False, False])
    assert gr.attribution.select_tokens(a, 2) == gr.attribution.Selection((0, 1), (2, 5))
    assert gr.attribution.select_tokens(a, 1, 1) == gr.attribution.Selection((0, 4), (2, 5))
    assert gr.attribution.select_tokens(a, 0, 2) == gr.attribution.Selection((0, 1), (2,))
    assert gr.attribution.select_tokens(a, 2, 0) == gr.attribution.Selection((4, 3), (5,))
    for budget in ((0, None), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="at least"):
            gr.attribution.select_tokens(a, *budget)


def test_chance_draws_as_many_patches_and_words() -> None:
    from grains_tl.attribution.selection import random_selection

    is_image = [True] * 8 + [False] * 6
    drawn = random_selection(
        [True] * 14, gr.attribution.Selection((0, 1, 9), (2, 10, 11)), torch.Generator().manual_seed(0), is_image
    )
    assert [sum(p < 8 for p in side) for side in (drawn.toward_chosen, drawn.toward_rejected)] == [2, 1]
    assert len({*drawn.toward_chosen, *drawn.toward_rejected}) == 6


def test_neighbours_are_taken_among_what_is_left(llava: Any) -> None:
    record = gr.tokens.tokenize_pairs(llava, [pair(picture(0))])[0]
    x = prompt_embeddings(llava, record)
    stand_ins = replacements(llava, [record], gr.hooks.Mask("zero", "neighbour_patch"))
    ids, offset = torch.tensor([record.prompt]), torch.zeros(1, dtype=torch.long)

    def at(place: int, masked: list[int]) -> torch.Tensor:
        return stand_ins.rows([0], offset, ids, [masked])[0, place]

    # 4 x 4 patches from position 0: the corner's neighbours are 1 and 4; without 1, only 4; without both, 2, 5 and 8
    assert torch.allclose(at(0, [0]), x[[1, 4]].mean(0))
    assert torch.allclose(at(0, [0, 1]), x[4])
    assert torch.allclose(at(0, [0, 1, 4]), x[[2, 5, 8]].mean(0))
    assert torch.allclose(at(0, list(range(16))), x[:16].mean(0))  # nothing left: the mean patch


def test_an_unknown_image_masker_is_refused(llava: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match="image='grey' is not known; expected one of"):
        gr.attribute(llava, pair(picture(0)), mask=gr.hooks.Mask(image="grey"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image='grey'"):
        gr.build_vectors(llava, [pair(picture(0))], mask=gr.hooks.Mask(image="grey"), progress=False)  # type: ignore[arg-type]


def test_vectors_remember_the_images_and_resume(llava: Any, tmp_path: Path) -> None:
    pairs = [pair(picture(i)) for i in range(2)]
    options: dict[str, Any] = {"top_k": 1, "top_k_image": 2, "progress": False}
    first = gr.build_vectors(llava, pairs, checkpoint=tmp_path / "done.jsonl", **options)
    n_lines = len((tmp_path / "done.jsonl").read_text().splitlines())
    again = gr.build_vectors(llava, pairs, checkpoint=tmp_path / "done.jsonl", **options)
    assert torch.equal(first.directions, again.directions)
    assert n_lines == len((tmp_path / "done.jsonl").read_text().splitlines()) == 2
    others = [pair(picture(i)) for i in (5, 6)]  # same words, other pictures
    other = gr.build_vectors(llava, others, checkpoint=tmp_path / "done.jsonl", **options)
    assert other.info["data_hash"] != first.info["data_hash"]
    assert len((tmp_path / "done.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="top_k_image=17 is more than the 16 patches"):
        gr.build_vectors(llava, pairs, top_k=1, top_k_image=17, progress=False)


def test_image_tokens_without_an_image_do_not_run(llava: Any) -> None:
    from grains_tl.models.running import forward_logits, run_blocks

    ids = torch.tensor([gr.tokens.tokenize_pairs(llava, [pair(picture(0))])[0].prompt])
    for run in (
        lambda: forward_logits(llava, ids, torch.ones_like(ids), torch.tensor([3])),
        lambda: run_blocks(llava, ids, torch.ones_like(ids), 1),
    ):
        with pytest.raises(ValueError, match="no image was given"):
            run()
    assert gr.check_model(llava).ok.all()


def test_generation_wants_one_image_entry_per_prompt(llava: Any) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 images"):
        gr.generate(llava, [PROMPT] * 2, images=[picture(0)])


def test_heatmap_shows_patches_and_words_on_one_scale(llava: Any) -> None:
    a = gr.attribute(llava, pair(picture(0)), method="gradient_x_input")
    fig = plot_image_attribution(a, picture(0))
    panel = next(ax for ax in fig.axes if ax.images)
    assert len(panel.patches) == 16
    scores = a.scores.tolist()
    top = max(map(abs, scores))
    boxes = {tuple(p.get_facecolor()) for ax in fig.axes for p in ax.patches}
    for score in scores:  # every token's colour, patch or word: hue by sign, strength by |score| / largest
        assert any(abs(c[3] - 0.8 * abs(score) / top) < 1e-6 and (c[2] > c[0]) == (score > 0) for c in boxes)
    # a centre crop: the drawn grid leaves the sides of the 40 x 24 picture free
    lefts = sorted(p.get_x() for p in panel.patches)
    assert lefts[0] == pytest.approx(8) and lefts[-1] == pytest.approx(26)
    with pytest.raises(ValueError, match=r"got 2 image\(s\), expected 1"):
        plot_image_attribution(a, [picture(0)] * 2)
    with pytest.raises(ValueError, match="no image"):
        plot_image_attribution(gr.attribute(llava, pair(), method="gradient_x_input"), picture(0))
    share = attribution_share(a)
    assert share["image"] == pytest.approx(a.scores[:16].abs().sum().item() / a.scores.abs().sum().item())


def test_captions_mark_what_is_absent() -> None:
    fig = plot_captions(
        [picture(0), picture(1)],
        {"before": ["A dog, a cat .", "a dog"], "after": ["a cat .", "a dog"]},
        [{"dog"}, {"CAT"}],
    )
    bold = [t.get_text() for ax in fig.axes for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold == ["dog,"]
    assert any("before: 1 of 2,  after: 0 of 2" in t.get_text() for ax in fig.axes for t in ax.texts)
    with pytest.raises(ValueError, match="one caption of each name"):
        plot_captions([picture(0)], {"before": ["a", "b"]}, [set()])


def test_a_folder_with_a_vision_model_loads_with_its_processor(tmp_path: Path, llava: Any) -> None:
    build(FAMILIES[0]).save_pretrained(tmp_path)
    FAMILIES[0].processor().save_pretrained(tmp_path)
    model = gr.load_model(str(tmp_path))
    assert type(model.processor).__name__ == "LlavaProcessor"
    tokenized = [gr.tokens.tokenize_pairs(m, [pair(picture(0))]) for m in (model, llava)]
    assert tokenized[0][0].prompt == tokenized[1][0].prompt
    scores = [gr.score_pairs(m, t) for m, t in zip((model, llava), tokenized, strict=True)]
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
