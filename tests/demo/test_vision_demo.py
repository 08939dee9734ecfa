"""Caption steering and the vision demo on the bundled model, in small: the parts add up, the page says what was found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.demo import scene_captions as cp
from grains_tl.demo import scene_questions as qu
from grains_tl.demo import scene_records as tv_scene_records
from grains_tl.demo.vision import VisionDemoSettings, run_vision_demo, vision_summary
from grains_tl.models import tiny_vlm as tv_tiny_vlm
from grains_tl.models._scene_grid import patches_of
from studies.tiny_vlm.yes_no_study import yes_no_study

NORM = 300.0
SMALL = VisionDemoSettings(
    n_build=4,
    n_choose=12,
    n_test=24,
    n_questions=4,
    seeds=(0,),
    n_random=1,
    methods=(("leave_one_out", 1),),
    layers=(2,),
)


@pytest.fixture(scope="module")
def vlm() -> Any:
    return gr.load_model("tiny-vlm")


@pytest.fixture(scope="module")
def choose(vlm: Any) -> cp.Captioned:
    return cp.caption_split(vlm, "choose", 16)


def some_vectors(seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(4), torch.full((4,), NORM))


def test_captions_are_those_of_generate(vlm: Any) -> None:
    """The large-batch decoder of the study against the package's own ``generate``, unsteered and steered."""
    _, pictures = tv_scene_records.scenes_for("test", 5)
    prompt = tv_tiny_vlm.question_text("describe the picture .")
    for hooks in ([], some_vectors().hooks(0.4, [2])):
        expected = gr.generate(vlm, [prompt] * 5, hooks, images=pictures, max_new_tokens=24)
        scenes = tv_scene_records.scenes_for("test", 5)[0]
        assert cp.caption_scenes(vlm, scenes, pictures, hooks).said == [text.strip() for text in expected]


def test_own_mistakes_are_mistakes(vlm: Any) -> None:
    for pair in cp.own_mistakes(vlm, 5, seed=3):
        assert pair.meta["absent"] and not set(pair.meta["absent"]) & set(pair.meta["digits"])
        said = gr.generate(vlm, [str(pair.prompt)], images=[pair.image], max_new_tokens=24)[0]
        assert said.split() == str(pair.rejected).split()
    with pytest.raises(ValueError, match="5 are wanted"):
        cp.own_mistakes(vlm, 5, at_most=2)


def test_kl_is_that_of_the_plain_model(vlm: Any, choose: cp.Captioned) -> None:
    """Mean over caption tokens of sum p log(p / q), the steering done by a plain PyTorch hook on the Hugging Face model."""
    meter = cp.kl_meter(vlm, choose, n=3)
    vectors, alpha, layer = some_vectors(), 0.5, 1
    step = alpha * NORM * vectors.directions[layer]
    plain, processor = tv_tiny_vlm.load_tiny_vlm()

    def steer(module: Any, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        moved = h + step
        moved = moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    total, n = 0.0, 0
    for picture, said in zip(choose.pictures[:3], choose.said[:3], strict=True):
        text = f"{tv_tiny_vlm.question_text('describe the picture .')} {said} <eos>"
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        start = inputs["input_ids"].shape[1] - len(said.split()) - 1
        with torch.no_grad():
            base = plain(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
            handle = plain.model.language_model.layers[layer].register_forward_hook(steer)
            steered = plain(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
            handle.remove()
        total, n = total + float((steered.exp() * (steered - base)).sum()), n + len(base)
    assert cp.caption_kl(vlm, meter, vectors.hooks(alpha, [layer])) == pytest.approx(total / n, rel=2e-2)
    assert cp.caption_kl(vlm, meter, []) == pytest.approx(0, abs=1e-6)


def test_alphas_give_the_kl_that_was_asked_for(vlm: Any, choose: cp.Captioned) -> None:
    meter, vectors = cp.kl_meter(vlm, choose, n=8), some_vectors()
    wanted = (0.005, 0.02, 1e6)
    alphas = cp.alphas_for_kl(vlm, meter, vectors, 1, wanted)
    found = [cp.caption_kl(vlm, meter, vectors.hooks(a, [1])) for a in alphas[:2]]
    assert found == pytest.approx(list(wanted[:2]), rel=0.35)
    assert math.isnan(alphas[2])


def test_tuning_chooses_on_one_set_and_measures_on_the_other(vlm: Any, choose: cp.Captioned) -> None:
    test = cp.caption_split(vlm, "test", 12)
    meter, vectors = cp.kl_meter(vlm, choose, n=8), some_vectors()
    rows = cp.tune_and_test(vlm, vectors, choose=choose, test=test, meter=meter, kls=(0.005, 0.02), layers=(1, 2))
    assert [r["kl"] for r in rows] == [0.005, 0.02] and sum(r["free"] for r in rows) == 1
    for row in rows:
        hooks = vectors.hooks(row["alpha"], [row["layer"]])
        again = cp.caption_scenes(vlm, test.scenes, test.pictures, hooks).scores
        assert (again.hallucinating, again.coverage) == (row["hallucinating"], row["coverage"])
        other = 3 - row["layer"]
        alpha = cp.alphas_for_kl(vlm, meter, vectors, other, [row["kl"]])[0]
        if math.isfinite(alpha):  # a layer that cannot reach this KL is no rival
            rival = cp.caption_scenes(vlm, choose.scenes, choose.pictures, vectors.hooks(alpha, [other])).scores.f1
            assert row["choose_f1"] >= rival


def test_occlusion_is_the_fall_of_the_margin(vlm: Any) -> None:
    """Against the plain Hugging Face model, its image features replaced by their mean over the picture."""
    questions = [q for q in tv_scene_records.yes_no_questions("test", 3) if q.split == "adversarial"][:3]
    found = qu.occlusion(vlm, questions)
    plain, processor = tv_tiny_vlm.load_tiny_vlm()
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for row, question in enumerate(questions):
        inputs = processor(
            images=[question.image], text=[tv_tiny_vlm.question_text(question.question)], return_tensors="pt"
        )

        def margin(cell: int | None, inputs: Any = inputs) -> float:
            def cover(module: Any, args: Any, output: Any) -> Any:
                if cell is None:
                    return output
                out = output.clone()
                out[0, list(patches_of(cell))] = output[0].mean(0)
                return out

            handle = plain.model.multi_modal_projector.register_forward_hook(cover)
            with torch.no_grad():
                logits = plain(**inputs).logits[0, -1]
            handle.remove()
            return float(logits[yes] - logits[no])

        expected = [margin(None) - margin(cell) for cell in range(4)]
        assert found[row].tolist() == pytest.approx(expected, abs=5e-2)


def test_false_yes_lies_on_the_partner(vlm: Any) -> None:
    questions = qu.false_yes_questions(vlm, 12)
    assert all(not q.answer for q in questions) and (qu.question_margins(vlm, questions) > 0).all()
    shares = qu.partner_share(vlm, questions, qu.yes_attributions(vlm, questions))
    assert shares["of_image"] - 2 * shares["of_image_se"] > 0.25
    assert shares["n"] == 12 and shares["median_relative_gap"] is None


def test_yes_no_study_has_a_constant_bias_that_leaves_auc_alone(vlm: Any) -> None:
    frame = yes_no_study(vlm, seeds=(0,), n_build=4, n_choose=10, n_test=15, n_random=1, layers=(1,)).set_index(
        "vector"
    )
    assert frame.loc["constant bias", "auc"] == frame.loc["unsteered", "auc"]
    assert set(frame.index) >= {"leave_one_out, mean", "leave_one_out, pca", "CAA", "random direction 1"}


def test_the_demo_writes_a_page_that_says_what_it_found(vlm: Any, tmp_path: Path) -> None:
    results = run_vision_demo(vlm, tmp_path, SMALL)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = {row["vector"]: row for row in results["table"]}
    assert {"leave_one_out, mean", "leave_one_out, pca", "CAA", "random tokens masked"} <= set(table)
    assert all(row["low"] <= row["hallucinating"] <= row["high"] for row in results["table"])
    against = results["against"]["no steering"]
    difference = results["base"]["hallucinating"] - table["leave_one_out, mean"]["hallucinating"]
    assert against["difference"] == pytest.approx(difference, abs=1e-6)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{table['CAA']['hallucinating']:.3f}" in page
    assert not any(word in page for word in ("<script", "http:", "https:"))
    assert page.count("<img") == 3
    for row in results["captions"]:
        spoken = {int(w) for t in (row["before"], row["after"]) for w in t.split() if w.isdigit()}
        true = {int(w) for w in row["truth"].split() if w.isdigit()}
        assert set(row["absent"]) == spoken - true
    text = vision_summary(results)
    assert "VERDICT" in text and re.search(r"CAA +[01]\.\d{3}", text)


def test_demo_refuses_text_sets_for_the_vision_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "tiny-vlm", "--set", "sentiment"]) == 2
    assert "makes its own scenes" in capsys.readouterr().err


def test_cell_scores_sum_over_the_cell() -> None:
    scores = torch.arange(20.0) - 8
    flags = torch.tensor([False] + [True] * 16 + [False] * 3)
    a = gr.Attribution(scores, ["x"] * 20, flags, flags, None, 0.0, None, "leave_one_out")
    for positive in (False, True):
        found = qu.cell_scores([a], positive=positive)[0]
        image = scores[1:17].clamp(min=0) if positive else scores[1:17]
        assert found.tolist() == [sum(image[p].item() for p in patches_of(c)) for c in range(4)]
    assert np.isfinite(found.numpy()).all()
