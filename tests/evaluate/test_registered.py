"""The adapter as lm-evaluation-harness' own model ``grains_tl``: made from its arguments, run by its own command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.evaluate.model_args import steered_model
from tests.conftest import tiny_hf, tiny_tokenizer
from tests.evaluate.test_lm_eval import local_task, row, write_task  # noqa: F401

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'grains-tl[evals]')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with vectors beside it."""
    path = tmp_path_factory.mktemp("model")
    tiny_hf().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    raw = torch.linspace(-1, 1, 32).repeat(3, 1)
    vectors = gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 10.0), {"method": "test"})
    vectors.save(path / "bare.safetensors")
    vectors.steering(0.9, 1, operator="add").save(path / "chosen.safetensors")
    return path


def test_their_command_runs_it_on_a_local_task(local_task: Path, folder: Path, capfd: Any) -> None:  # noqa: F811
    adjectives, nouns = ("great", "awful", "good", "bad", "cold", "warm"), ("film", "soup")
    rows = [row(f"was the {n} {a} ?", [f"it was {b}", f"no {a} {n}"]) for n in nouns for a, b in pairwise(adjectives)]
    data = write_task(local_task, rows)
    items = gr.records.load_benchmark("truthfulqa", data, prompt_format="qa").items
    model = gr.load_model(str(folder))
    seen: list[torch.Tensor] = []
    file = folder / "chosen.safetensors"
    for vectors, hooks in (("", None), (f",vectors={file}", gr.load_vectors(file).chosen)):
        out = local_task / f"out{len(seen)}"
        run = ["run", "--model", "grains_tl", "--model_args", f"pretrained={folder}{vectors}", "--tasks", "local_mc1"]
        run += ["--include_path", str(local_task), "--output_path", str(out), "--log_samples", "--batch_size", "2"]
        with torch.random.fork_rng():
            status = main(["lm-eval", *run])
        assert status == 0
        ours = gr.inference.score_choices(model, items, hooks)
        (results,) = out.rglob("results*.json")
        accuracy = json.loads(results.read_text())["results"]["local_mc1"]["acc,none"]
        assert accuracy == pytest.approx(gr.inference.mc1(ours, items).mean().item(), abs=1e-4)
        (samples,) = out.rglob("samples*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        logprobs = torch.tensor([[float(x[0]) for x in line["filtered_resps"]] for line in lines])
        torch.testing.assert_close(logprobs, ours, atol=1e-3, rtol=0)
        seen.append(logprobs)
    assert not torch.allclose(seen[0], seen[1], atol=0.01)


def test_it_is_known_under_its_name(folder: Path) -> None:
    from lm_eval.api.registry import get_model

    assert gr.evaluate.harness.register() == gr.evaluate.harness.register() == "grains_tl"
    made = get_model("grains_tl").create_from_arg_string(
        f"pretrained={folder},vectors={folder / 'bare.safetensors'},alpha=0.3,layer=0+2,positions=generated",
        {"batch_size": "auto", "device": "cpu", "max_batch_size": None},
    )
    assert made.fwd_hooks.label == "test, alpha +0.3, layers 0, 2, generated" and made.batch_size == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 0.2}, "without vectors"),
        ({"vectors": "bare.safetensors"}, "names no steering"),
        ({"vectors": "bare.safetensors", "layer": 1}, "without alpha"),
        ({"vectors": "chosen.safetensors", "alfa": 1}, "alfa"),
        ({"dtype": "float23"}, "float23"),
        ({"vectors": "none.safetensors"}, "no file"),
    ],
)
def test_arguments_that_cannot_be(folder: Path, given: dict[str, Any], message: str) -> None:
    if "vectors" in given:
        given = {**given, "vectors": str(folder / given["vectors"])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        steered_model(str(folder), given)


def test_a_choice_is_taken_from_the_file_and_replaced_by_what_is_given(folder: Path) -> None:
    file = str(folder / "chosen.safetensors")
    assert steered_model(str(folder), {"vectors": file})[1].label == "test, alpha +0.9, layer 1, add"  # type: ignore[union-attr]
    assert steered_model(str(folder), {"vectors": file, "alpha": "0.2"})[1].label == "test, alpha +0.2, layer 1"  # type: ignore[union-attr]
    assert steered_model(str(folder), {})[1] is None
