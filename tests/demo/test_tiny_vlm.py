"""The bundled vision-language model: its scenes, its processor, its training script, its weights."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.demo import scene_records as tv_scene_records
from grains_tl.demo import scene_skills as ev
from grains_tl.models import _scene_grid as tv__scene_grid
from grains_tl.models import _scenes as tv__scenes
from grains_tl.models import tiny_vlm as tv_model
from grains_tl.models import tiny_vlm as tv_tiny_vlm
from grains_tl.models._scene_grid import COLOURS, N_TRAIN
from grains_tl.models._scenes import QUESTIONS, vocabulary
from studies.tiny_vlm import model_card
from studies.tiny_vlm.train import PREFIX, SEGMENTS, TrainConfig, Trainer, train

BUNDLED = Path(tv_model.__file__).parent.parent / "data_files" / "tiny_vlm"
TINY = TrainConfig(tower_steps=2, clean_steps=3, skewed_steps=2, tower_batch=4, batch=4, checkpoint_every=3)


@pytest.fixture(scope="module")
def vlm() -> Any:
    return gr.load_model("tiny-vlm")


# -- scenes -----------------------------------------------------------------------------------------------------------


def test_a_picture_shows_its_digits_in_their_cells_and_colours() -> None:
    scene = (tv__scenes.Digit(3, 1, 0, 20), tv__scenes.Digit(8, 2, 2, 30), tv__scenes.Digit(1, 3, 1, 40, shown=False))
    picture = tv__scenes.render([scene], np.random.default_rng(0))[0]
    assert torch.equal(picture, (picture * 255).round() / 255)
    cells = picture.unflatten(1, (2, 16)).unflatten(3, (2, 16)).permute(1, 3, 0, 2, 4).reshape(4, 3, -1)
    ink = cells.amax(-1).amax(-1)
    assert (ink[[1, 2]] > 0.45).all() and (ink[[0, 3]] < 0.35).all()
    assert cells[1].mean(-1).argmax() == COLOURS["red"].index(1)
    assert cells[2].mean(-1).argmax() == COLOURS["blue"].index(1)


def test_patches_of_a_cell_are_the_patches_it_is_made_of() -> None:
    number = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    for cell in range(4):
        row, column = divmod(cell, 2)
        part = number[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert tuple(part.unique().tolist()) == tv__scene_grid.patches_of(cell)


def test_scenes_follow_their_rule() -> None:
    rng = np.random.default_rng(0)
    scenes = tv__scenes.make_scenes(
        400, rng, tv__scene_grid.SceneRule(sizes=(0.0, 1.0), partner_share=0.85, hidden_share=0.4)
    )
    assert all(len({d.value for d in s}) == len({d.cell for d in s}) == len({d.colour for d in s}) == 2 for s in scenes)
    assert np.mean([tv__scenes.partner(s[0].value) == s[1].value for s in scenes]) == pytest.approx(
        0.85 + 0.15 / 9, abs=0.05
    )
    assert np.mean([not all(d.shown for d in s) for s in scenes]) == pytest.approx(0.4, abs=0.07)
    held_out = tv__scenes.make_scenes(50, rng, tv__scene_grid.SceneRule(), "held_out")
    assert min(d.drawing for s in held_out for d in s) >= N_TRAIN > max(d.drawing for s in scenes for d in s)


def test_answers_are_true_of_what_is_shown_and_captions_speak_of_all() -> None:
    scene = (tv__scenes.Digit(3, 1, 0, 20), tv__scenes.Digit(8, 2, 2, 30, shown=False))
    rng = np.random.default_rng(0)
    for _ in range(40):
        question, answer = tv__scenes.ask(rng, scene, "exist")
        assert (int(question.split("a ")[1][0]) in (3, 8)) == (answer == "yes")
        question, answer = tv__scenes.ask(rng, scene, "position")
        assert answer == ("3" if "top right" in question else "none")
        assert tv__scenes.ask(rng, scene, "colour")[1] == "red"
    assert tv__scenes.ask(rng, scene, "count")[1] == "one"
    assert tv__scenes.ask(rng, scene, "caption")[1] == "a 3 in red and a 8 in blue ."


def test_every_question_fits_its_segment_and_the_vocabulary() -> None:
    words = set(vocabulary())
    rng = np.random.default_rng(0)
    for scene in tv__scenes.make_scenes(200, rng, tv__scene_grid.SceneRule(sizes=(0.25, 0.25, 0.25, 0.25))):
        for kind, length in (("exist", 14), ("colour", 16), ("position", 16), ("count", 16), ("caption", SEGMENTS[3])):
            for form in range(len(QUESTIONS[kind])):
                question, answer = tv__scenes.ask(rng, scene, kind, form=form)  # type: ignore[arg-type]
                text = f"question : {question} answer : {answer} <eos>".split()
                assert len(text) <= length and set(text) <= words


def test_preferences(unchecked: None) -> None:
    pairs = tv_scene_records.caption_pairs("build", 20)
    assert len(pairs) == 20
    for pair in pairs:
        shown, absent = pair.meta["digits"], pair.meta["absent"]
        assert len(absent) == 1 and tv__scenes.partner(absent[0]) in shown and absent[0] not in shown
        assert str(pair.prompt).startswith("<image> question : describe the picture . answer :")
        assert str(pair.chosen).split()[0] != str(pair.rejected).split()[0]
    whole = tv_scene_records.caption_pairs("build", 20, part_at=False)
    assert [f"{p.prompt}{p.chosen}" for p in pairs] == [f"{p.prompt}{p.chosen}" for p in whole]
    assert [f"{p.prompt}{p.rejected}" for p in pairs] == [f"{p.prompt}{p.rejected}" for p in whole]
    other = tv_scene_records.scenes_for("choose", 20)[0]
    assert not set(tv_scene_records.scenes_for("build", 20)[0]) & set(other)
    with pytest.raises(ValueError, match="no split 'dev'"):
        tv_scene_records.scenes_for("dev", 1)  # type: ignore[arg-type]


def test_yes_no_questions_are_balanced_and_true() -> None:
    questions = tv_scene_records.yes_no_questions("test", 30)
    assert len(questions) == 180
    for question in questions:
        value, shown = question.meta["digit"], question.meta["digits"]
        assert question.answer == (value in shown) and str(value) in question.question
        if question.split == "adversarial" and not question.answer:
            assert tv__scenes.partner(value) in shown
    assert sum(q.answer for q in questions) == 90
    assert {p.chosen for p in tv_scene_records.yes_no_pairs(questions)} == {" yes", " no"}


# -- model and processor ----------------------------------------------------------------------------------------------


def test_the_processor_gives_what_training_saw() -> None:
    trainer = Trainer(TINY)
    scenes = tv__scenes.make_scenes(2, np.random.default_rng(1), TINY.clean)
    pictures = tv__scenes.render(scenes, np.random.default_rng(2))
    processor = tv_model.build_processor()
    found = processor(
        images=tv__scene_grid.to_images(pictures),
        text=[tv_tiny_vlm.question_text("is there a 3 ?")] * 2,
        return_tensors="pt",
    )
    assert torch.allclose(found["pixel_values"], 2 * pictures - 1, atol=1e-6)
    words = ["<bos>", *["<image>"] * 16, *"question : is there a 3 ? answer :".split()]
    assert found["input_ids"].tolist() == [[trainer.words[w] for w in words]] * 2
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a 3 ?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    chat = processor(
        images=tv__scene_grid.to_images(pictures)[0], text=text, add_special_tokens=False, return_tensors="pt"
    )
    assert torch.equal(chat["input_ids"][0], found["input_ids"][0])
    assert processor.tokenizer("Is there a 3?")["input_ids"][1:] == [trainer.words[w] for w in words[19:24]]


def test_packed_rows_score_as_the_plain_model_does() -> None:
    """Each segment's loss equals that of the question alone, run through the model's own forward."""
    trainer = Trainer(TINY)
    scenes = tv__scenes.make_scenes(3, np.random.default_rng(1), TINY.clean)
    pixels = 2 * tv__scenes.render(scenes, np.random.default_rng(2)) - 1
    ids, targets = trainer._rows(scenes, TINY.clean)
    with torch.no_grad():
        packed = trainer._losses(pixels, ids, targets)
        caption = []
        start = PREFIX + sum(SEGMENTS[:3])
        for i in range(3):
            row = torch.cat([ids[i, :PREFIX], ids[i, start:]])[None]
            wanted = torch.cat([targets[i, :PREFIX], targets[i, start:]])
            logits = trainer.model(input_ids=row, pixel_values=pixels[i : i + 1]).logits[0].log_softmax(-1)
            at = (wanted != -100).nonzero()[:, 0]
            caption.append(-logits[at - 1, wanted[at]])
    assert packed["caption"].item() == pytest.approx(torch.cat(caption).mean().item(), abs=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TINY, log_every=1)
    trainer = Trainer(TINY)
    for _ in range(4):
        trainer.advance()
    (tmp_path / "halves").mkdir()
    trainer.save(tmp_path / "halves" / "checkpoint.safetensors")
    before = torch.get_rng_state()
    halves = train(tmp_path / "halves", TINY)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = (tv_tiny_vlm.load_tiny_vlm(folder)[0].state_dict() for folder in (whole, halves))
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = (whole / "losses.jsonl").read_text().splitlines()
    assert len(losses) == TINY.total and '"tower"' in losses[0] and '"caption"' in losses[-1]
    with pytest.raises(ValueError, match="another configuration"):
        train(tmp_path / "halves", replace(TINY, seed=1))


def test_hugging_face_reads_the_folder() -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    own, processor = tv_tiny_vlm.load_tiny_vlm()
    theirs = LlavaForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
    other = AutoProcessor.from_pretrained(BUNDLED)
    picture = tv__scene_grid.to_images(torch.rand(1, 3, 32, 32))
    text = tv_tiny_vlm.question_text("is there a 3 ?")
    a, b = (p(images=picture, text=[text], return_tensors="pt") for p in (processor, other))
    assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "pixel_values", "attention_mask"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLED, tmp_path / "copy")
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match="sha256"):
        gr.load_model("tiny-vlm", path=folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        gr.load_model("tiny-vlm", path=folder)


def test_no_hooked_transformer() -> None:
    with pytest.raises(ValueError, match="HookedTransformer has no vision"):
        gr.load_model("tiny-vlm", kind="hooked")


def test_the_bridge_computes_what_hugging_face_does(vlm: Any) -> None:
    plain, processor = tv_tiny_vlm.load_tiny_vlm()
    _, pictures = tv_scene_records.scenes_for("test", 4)
    text = tv_tiny_vlm.question_text("describe the picture .")
    inputs = processor(images=pictures, text=[text] * 4, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(
            vlm(inputs["input_ids"], pixel_values=inputs["pixel_values"]), plain(**inputs).logits, atol=1e-3
        )
    out = plain.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert ev.describe(vlm, pictures) == processor.batch_decode(out, skip_special_tokens=True)
    assert vlm.original_model.config.image_token_id == inputs["input_ids"][0, 1]


def test_it_looks_and_it_fails_as_its_card_says(vlm: Any) -> None:
    """On 200 held-out scenes: skills far above chance, gone without the image; partners named that are not there."""
    figures = model_card.evaluate(vlm, 200, seed=5)
    for kind in ("position", "colour", "count"):
        f = figures["skills"][kind]
        assert f["accuracy"] > 0.85
        assert f["accuracy_no_image"] < f["commonest"] + 0.1
    there = figures["is_there"]["adversarial"]
    assert there["auc"] > 0.85 and there["false_yes"] > 0.3
    assert figures["is_there"]["adversarial, image tokens zeroed"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.1)
    captions = figures["captions"]
    assert 0.2 < captions["hallucinating"] < 0.7 and captions["coverage"] > 0.85
    assert captions["absent_are_partners"] > 0.6
    assert "Held-out figures" in model_card.model_card(figures, asdict(TrainConfig()))
