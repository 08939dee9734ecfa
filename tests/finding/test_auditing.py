"""An audit says yes to a planted direction, no to a random one, and where the yes comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.finding.records import split_for_search
from grains_tl.records.pairs import plain_text
from tests.conftest import KINDS
from tests.finding.test_finding import QUICK, varied_pairs
from tests.helpers.planted import COPY, axis, planted_model


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model("bridge")


def planted_vectors(layers: tuple[int, ...] = (1, 2)) -> gr.SteeringVectors:
    return axis(COPY, list(layers))


def other_words(n: int) -> list[gr.PreferencePair]:
    return [gr.PreferencePair(f"{p.prompt} and", p.chosen, p.rejected) for p in varied_pairs(n, seed=7)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_that_the_model_reads_steers(kind: str, tmp_path: Path) -> None:
    model = planted_model(kind)
    torch.save(dict(zip((1, 2), planted_vectors().raw, strict=True)), tmp_path / "v.pt")
    result = gr.audit(model, tmp_path / "v.pt", varied_pairs(30), ["caa", "random_direction"], **QUICK)
    assert result.steers
    assert result.verdict.startswith("The vector steers")
    assert result.row["above_low"] > 0
    assert set(result.table["recipe"]) == {"audited", "caa", "random_direction"}
    assert result.records["change"].mean() == pytest.approx(result.row["effect"])
    assert f"0 of {len(result.records)} report records move the wrong way" in result.verdict
    assert "caa" in result.verdict


def test_a_random_direction_and_a_reversed_one_do_not(planted: Any) -> None:
    random = gr.SteeringVectors.from_raw(
        torch.randn(2, int(planted.cfg.d_model), generator=torch.Generator().manual_seed(5)), (1, 2), torch.ones(2) * 9
    )
    reversed_ = gr.audit(planted, -planted_vectors(), varied_pairs(30), "random_direction", **QUICK)
    assert not reversed_.steers
    assert "wrong way" in reversed_.verdict.splitlines()[0]
    assert (reversed_.records["change"] < 0).mean() > 0.9
    assert not gr.audit(planted, random, varied_pairs(30), "random_direction", **QUICK).steers


def test_a_steering_is_judged_at_its_layer_and_on_other_words(planted: Any) -> None:
    steering = planted_vectors().steering(0.2, 2)
    options = {key: value for key, value in QUICK.items() if key != "layers"}
    result = gr.audit(
        planted, steering, varied_pairs(24), "random_direction", other_wordings=other_words(10), **options
    )
    assert result.row["layer"] == 2
    assert result.wordings["n"].tolist() == [result.row["n"], 10]
    own = result.wordings.iloc[0]
    assert (own["low"], own["high"]) == (result.row["low"], result.row["high"])  # one interval, wherever it is shown
    assert "On 10 records in other words" in result.verdict
    assert "<script" not in result._repr_html_() and "audited" in result._repr_html_()


def test_without_continuations_the_finished_audit_is_not_lost(planted: Any) -> None:
    result = gr.audit(planted, planted_vectors(), varied_pairs(20), "random_direction", **{**QUICK, "n_examples": 0})
    assert result.quality.empty
    assert result.row["n"] == len(result.records)


def test_continuations_are_those_of_the_audited_vector_and_in_chat_form(planted: Any) -> None:
    """Of conversations as they are sent, also where another recipe is the best."""
    pairs = [
        gr.PreferencePair([{"role": "user", "content": p.prompt}], str(p.chosen).strip(), str(p.rejected).strip())
        for p in varied_pairs(20)
    ]
    for vectors in (planted_vectors(), -planted_vectors()):
        result = gr.audit(planted, vectors, pairs, ["caa", "random_direction"], **{**QUICK, "n_examples": 2})
        layer, alpha = int(result.row["layer"]), float(result.row["alpha"])
        parts = split_for_search(pairs, 0)
        prompts = list({plain_text(p.prompt): p.prompt for p in reversed(parts.report)}.values())[::-1][:2]
        for column, hooks in (("base_text", None), ("text", vectors.steering(alpha, layer))):
            assert result.quality[column].tolist() == gr.generate(planted, prompts, hooks, max_new_tokens=4)


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (planted_vectors().steering(0.1, [1, 2]), "one layer"),
        (planted_vectors().steering(0.1, 1, operator="add"), "add_renorm"),
        (gr.SteeringVectors.from_raw(torch.ones(1, 3), [1], torch.ones(1)), "d_model 3"),
        (planted_vectors() * 0, "all empty"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_runs(planted: Any, vector: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gr.audit(planted, vector, varied_pairs(12), **{**QUICK, "layers": None})


def test_the_shell_writes_a_report_and_its_status_tells_the_verdict(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grains_tl.cli.main.load", lambda args: planted)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in varied_pairs(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--pairs", str(pairs), "--layers", "1,2", "--draws", "3", "--recipes", "random_direction"]
    file = planted_vectors().save(tmp_path / "v.safetensors")
    assert main(["audit", str(file), *common, "--out", str(tmp_path / "yes")]) == 0
    assert "The vector steers" in capsys.readouterr().out
    assert "The vector steers" in (tmp_path / "yes" / "report.html").read_text()
    assert (tmp_path / "yes" / "table.csv").is_file()
    back = (-planted_vectors()).save(tmp_path / "back.safetensors")
    assert main(["audit", str(back), *common, "--out", str(tmp_path / "no")]) == 1
    assert main(["audit", str(tmp_path / "missing.gguf"), *common, "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
