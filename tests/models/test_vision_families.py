"""Every vision family against the plain Hugging Face model: forward, gradients, masks, steering, generation, geometry.

The oracle is the same random model without TransformerLens, called on what its own processor makes of the whole text, with
plain PyTorch hooks on its decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.hooks.stand_ins import prompt_embeddings
from tests.conftest import TL_MAJOR
from tests.helpers.vision_families import FAMILIES, ID, LAYERS, Family, bridge, build, picture

PROMPT = "question : what is this ? answer :"
CHOSEN, REJECTED = " a cat", " a big dog"
#: Largest difference from Hugging Face in logits of size 1 to 10. TransformerLens 3.9: see docs/vision-families.md.
TOLERANCE = 1e-4 if TL_MAJOR >= 4 else 5e-4
#: Wrong on images in TransformerLens 3.9: logits differ by up to 6 from Hugging Face.
REFUSED = ("Gemma 3",)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One family: the bridge, the plain model, its processor and its record."""
    made: Family = request.param
    if made.name in REFUSED and TL_MAJOR < 4:
        pytest.skip(f"{made.name} with images is refused on TransformerLens 3, see test_what_runs_wrongly_is_refused")
    pair = gr.PreferencePair(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, image=picture(0))
    return SimpleNamespace(
        name=made.name,
        n_patches=made.n_patches,
        model=bridge(made),
        hf=build(made),
        processor=made.processor(),
        pair=pair,
    )


def placeholder(family: SimpleNamespace) -> str:
    token = "<start_of_image>" if family.name == "Gemma 3" else family.processor.image_token
    return f"<|vision_start|>{token}<|vision_end|>" if "Qwen" in family.name else token


def plain_inputs(family: SimpleNamespace, text: str, image: Any) -> dict[str, Tensor]:
    """What the processor makes of a text, the image in front."""
    words = f"{placeholder(family)}\n{text}"
    return dict(family.processor(text=[words], images=[image], add_special_tokens=False, return_tensors="pt"))


def layers(hf: Any) -> Any:
    return hf.model.text_model.layers if hasattr(hf.model, "text_model") else hf.model.language_model.layers


def plain_logprob(family: SimpleNamespace, prompt: str, response: str, image: Any) -> Tensor:
    """Log-probability of a response, from full logits of the plain model."""
    inputs = plain_inputs(family, prompt + response, image)
    n = len(family.processor.tokenizer(response, add_special_tokens=False)["input_ids"])
    logprobs = family.hf(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    return sum(logprobs[len(ids) - n + i - 1, ids[len(ids) - n + i]] for i in range(n))  # type: ignore[return-value]


def plain_margin(family: SimpleNamespace, image: Any) -> Tensor:
    return plain_logprob(family, PROMPT, CHOSEN, image) - plain_logprob(family, PROMPT, REJECTED, image)


@contextmanager
def at_entry(hf: Any, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what enters the first decoder layer."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    handle = layers(hf)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_layer(hf: Any, layer: int, step: Tensor) -> Iterator[None]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + step, *output[1:]) if isinstance(output, tuple) else output + step

    handle = layers(hf)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.skipif(TL_MAJOR >= 4, reason="right in TransformerLens 4")
@pytest.mark.parametrize("made", [f for f in FAMILIES if f.name in REFUSED], ids=lambda f: f.name)
def test_what_runs_wrongly_is_refused(made: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridge(made)
    pair = gr.PreferencePair(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, image=picture(0))
    with pytest.raises(ValueError, match="install TransformerLens 4"):
        gr.tokens.tokenize_pairs(model, [pair])
    monkeypatch.setattr("grains_tl.tokens.images.NEEDS_TL4", ())
    family = SimpleNamespace(name=made.name, hf=build(made), processor=made.processor())
    found = gr.score_pairs(model, gr.tokens.tokenize_pairs(model, [pair]))[0]
    with torch.no_grad():
        wanted = plain_margin(family, pair.image)
    # should this fail, TransformerLens 3 has been repaired: take the family out of NEEDS_TL4
    assert abs(float(found[0] - found[1] - wanted)) > 0.01


def test_forward_and_margin_equal_hugging_face(family: SimpleNamespace) -> None:
    tokenized = gr.tokens.tokenize_pairs(family.model, [family.pair])
    found = gr.score_pairs(family.model, tokenized)[0]
    with torch.no_grad():
        wanted = [plain_logprob(family, PROMPT, r, family.pair.image) for r in (CHOSEN, REJECTED)]
    assert torch.allclose(found, torch.stack(wanted), atol=TOLERANCE), (found, wanted)


def test_the_image_matters(family: SimpleNamespace) -> None:
    pairs = [gr.PreferencePair(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, image=picture(i)) for i in (0, 1)]
    scores = gr.score_pairs(family.model, gr.tokens.tokenize_pairs(family.model, pairs))
    with torch.no_grad():
        wanted = torch.stack([plain_margin(family, pair.image) for pair in pairs])
    assert (wanted[0] - wanted[1]).abs() > 0.01
    assert torch.allclose(scores[:, 0] - scores[:, 1], wanted, atol=2 * TOLERANCE)


def test_batches_of_different_images_equal_single_runs(family: SimpleNamespace) -> None:
    images = [picture(0), None, picture(2, 24, 40), [picture(3), picture(4, 16, 16)]]
    pairs = [gr.PreferencePair(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, image=image) for image in images]
    tokenized = gr.tokens.tokenize_pairs(family.model, pairs)
    together = gr.score_pairs(family.model, tokenized, max_tokens=100_000)
    alone = torch.cat([gr.score_pairs(family.model, [t]) for t in tokenized])
    assert torch.allclose(together, alone, atol=TOLERANCE)


def test_patches_are_known(family: SimpleNamespace) -> None:
    record = gr.tokens.tokenize_pairs(family.model, [family.pair])[0]
    assert record.images is not None
    assert record.n_patches == family.n_patches == len(record.images.patches)
    assert all(record.is_image[p] and record.content[p] for p in record.images.patches)
    # the record is what the processor makes of prompt + response in one go
    whole = plain_inputs(family, PROMPT + CHOSEN, family.pair.image)
    assert whole["input_ids"][0].tolist() == [*record.prompt, *record.chosen]
    for key, values in record.images.token_inputs.items():
        assert whole[key][0, : len(record.prompt)].tolist() == list(values)
    assert {*whole} == {"input_ids", "attention_mask", *record.images.inputs, *record.images.token_inputs}
    # two images in one conversation
    two = gr.PreferencePair(
        prompt=[{"role": "user", "content": "what is this ?"}], chosen="a cat", rejected="a dog", image=[picture(0)] * 2
    )
    record = gr.tokens.tokenize_pairs(family.model, [two])[0]
    assert record.images is not None
    assert [s.image for s in record.images.spans] == sorted(s.image for s in record.images.spans)
    whole_each = (
        2 * 16 if family.name == "LLaVA-OneVision" else 2 * family.n_patches
    )  # its processor tiles lone images only
    assert record.n_patches == whole_each and {s.image for s in record.images.spans} == {0, 1}
    words = [t for t, c, i in zip(record.strings, record.content, record.is_image, strict=True) if c and not i]
    assert words == ["what", "is", "this", "?"]


def test_the_grid_points_at_the_right_place(family: SimpleNamespace) -> None:
    """Paint a patch of the picture: its own token must change most, in every grid."""
    size = (48, 48) if family.name in ("LLaVA-NeXT", "LLaVA-OneVision", "Idefics3") else (32, 32)
    ground = np.full((size[1], size[0], 3), 110, dtype=np.uint8)
    base = gr.tokens.tokenize_pairs(family.model, [gr.PreferencePair(PROMPT, CHOSEN, REJECTED, image=ground)])[0]
    assert base.images is not None
    before = prompt_embeddings(family.model, base)
    right, total = 0, 0
    for span in base.images.spans:
        for row, col in ((0, 0), (0, span.cols - 1), (span.rows - 1, 0), (span.rows // 2, span.cols // 2)):
            box = span.patch_box(row, col)
            assert box is not None
            left, top, end, bottom = (round(f * s) for f, s in zip(box, size * 2, strict=True))
            painted = ground.copy()
            painted[top:bottom, left:end] = (250, 5, 130)
            changed = gr.tokens.tokenize_pairs(
                family.model, [gr.PreferencePair(PROMPT, CHOSEN, REJECTED, image=painted)]
            )[0]
            moved = (prompt_embeddings(family.model, changed) - before).norm(dim=-1)[span.positions]
            total += 1
            right += int(moved.argmax()) == row * span.cols + col
    assert right / total > 0.8, (right, total)  # a random tower mixes patches; chance is 1 in 4 to 1 in 32


def test_gradients_at_the_merged_point_equal_the_plain_models(family: SimpleNamespace) -> None:
    leaves: list[Tensor] = []

    def leaf(act: Tensor) -> Tensor:
        leaves.append(act.detach().requires_grad_(True))
        return leaves[-1]

    with at_entry(family.hf, leaf):
        margin = plain_margin(family, family.pair.image)
    grads = torch.autograd.grad(margin, leaves)
    found = gr.attribute(family.model, family.pair, method="gradient_x_input")
    n = len(found.scores)
    wanted = sum((act.detach() * grad)[0, :n].sum(-1) for act, grad in zip(leaves, grads, strict=True))
    assert isinstance(wanted, Tensor)
    assert found.is_image.sum() >= family.n_patches and found.spans
    assert torch.allclose(found.scores, wanted, atol=1e-3 * float(wanted.abs().max())), (
        (found.scores - wanted).abs().max()
    )
    assert found.objective == pytest.approx(margin.item(), abs=2 * TOLERANCE)


@pytest.mark.parametrize("image_masker", ["mean_patch", "zero", "neighbour_patch", "blurred_image"])
def test_a_masked_patch_equals_the_plain_model_without_it(family: SimpleNamespace, image_masker: Any) -> None:
    record = gr.tokens.tokenize_pairs(family.model, [family.pair])[0]
    assert record.images is not None
    span = record.images.spans[-1]
    place = int(span.positions[1, 0])
    found = gr.attribute(family.model, family.pair, mask=gr.hooks.Mask(image=image_masker)).scores[place]
    patches = [p for s in record.images.spans for p in s.positions.flatten().tolist()]
    entry: list[Tensor] = []
    with at_entry(family.hf, lambda act: entry.append(act) or act), torch.no_grad():  # type: ignore[func-returns-value]
        base = plain_margin(family, family.pair.image)
        if image_masker == "blurred_image":
            from PIL import ImageFilter

            plain_margin(family, family.pair.image.filter(ImageFilter.GaussianBlur(4)))  # a tenth of 40 pixels
    act = entry[0][0]
    stand_in = {
        "mean_patch": act[patches].mean(0),
        "zero": torch.zeros_like(act[0]),
        "neighbour_patch": torch.stack([act[p] for p in _neighbours(span.positions, 1, 0)]).mean(0),
        "blurred_image": entry[-1][0][place],
    }[image_masker]

    def masked(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, place] = stand_in
        return x

    with at_entry(family.hf, masked), torch.no_grad():
        without = plain_margin(family, family.pair.image)
    assert float(found) == pytest.approx(float(base - without), abs=4 * TOLERANCE)


def _neighbours(places: Tensor, row: int, col: int) -> list[int]:
    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    inside = [(row + r, col + c) for r, c in steps if 0 <= row + r < len(places) and 0 <= col + c < len(places[0])]
    return [int(places[r, c]) for r, c in inside]


def test_steering_equals_a_plain_forward_hook(family: SimpleNamespace) -> None:
    step = torch.linspace(-1, 1, 32)
    hooks = gr.hooks.steer_hook(1, step, float(step.norm()), operator="add")
    tokenized = gr.tokens.tokenize_pairs(family.model, [family.pair])
    found = gr.score_pairs(family.model, tokenized, hooks)[0]
    base = gr.score_pairs(family.model, tokenized)[0]
    with after_layer(family.hf, 1, step), torch.no_grad():
        wanted = torch.stack([plain_logprob(family, PROMPT, r, family.pair.image) for r in (CHOSEN, REJECTED)])
    assert torch.allclose(found, wanted, atol=TOLERANCE)
    assert (found - base).abs().max() > 0.05


def test_generation_with_hooks_equals_the_plain_models(family: SimpleNamespace) -> None:
    step = torch.linspace(-1, 1, 32)
    images = [picture(0), picture(1, 32, 32)]
    found = gr.generate(
        family.model,
        [PROMPT] * 2,
        gr.hooks.steer_hook(1, step, float(step.norm()), operator="add"),
        images=images,
        max_new_tokens=6,
    )
    wanted, base = [], []
    with torch.no_grad():
        for image in images:
            inputs = plain_inputs(family, PROMPT, image)
            n = inputs["input_ids"].shape[1]
            base.append(family.hf.generate(**inputs, max_new_tokens=6, do_sample=False)[0, n:].tolist())
            with after_layer(family.hf, 1, step):
                wanted.append(family.hf.generate(**inputs, max_new_tokens=6, do_sample=False)[0, n:].tolist())
    ended = [ids[: ids.index(ID["<eos>"])] if ID["<eos>"] in ids else ids for ids in wanted]
    # a text goes on from its prompt, so it begins with the space that the tokenizer drops at a beginning
    assert found == [" " + family.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in ended]
    assert wanted != base


def test_vectors_are_built_and_steer(family: SimpleNamespace) -> None:
    pairs = [gr.PreferencePair(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, image=picture(i)) for i in range(3)]
    vectors = gr.build_vectors(family.model, pairs, top_k=1, top_k_image=2, progress=False)
    assert vectors.directions.shape == (LAYERS, 32)
    frame = gr.sweep(family.model, vectors, pairs, layers=[0, 1], alphas=[0.0, 0.3], progress=False)
    assert frame.loc[frame.alpha == 0, "effect"].abs().max() < 1e-4
    assert frame.loc[frame.alpha == 0.3, "effect"].abs().max() > 1e-3
