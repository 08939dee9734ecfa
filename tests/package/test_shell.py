"""What the shell says of itself, and options that name a recipe or leave the choice to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main

COMMANDS = ["demo", "find", "audit", "build", "steer", "sweep", "export", "push", "attribute", "plan"]


@pytest.mark.parametrize("command", [*COMMANDS, "compare-attributions"])
def test_every_command_says_what_it_does_and_gives_an_example(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    _usage, description, *_ = said.split("\n\n")
    assert description.strip()[0].isupper() and description.strip().endswith(".")
    assert f"  grains-tl {command} " in said.partition("example")[2]


def test_the_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == f"grains-tl {gr.__version__}"


def test_lm_eval_gets_its_own_options_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--help`` was refused as unknown."""
    seen: list[list[str]] = []
    monkeypatch.setattr("grains_tl.cli.main.run_lm_eval", lambda words: seen.append(list(words)))
    for words in (["--help"], ["run", "--help"], [], ["run", "--model", "grains_tl", "--limit", "3"]):
        assert main(["lm-eval", *words]) == 0
        assert seen[-1] == words


def build(folder: Path, *options: str) -> int:
    return main(["build", "--pairs", str(folder / "pairs.jsonl"), "--out", str(folder / "v.safetensors"), *options])


@pytest.mark.parametrize("recipe", ["caa", "margin_gradient", "grains"])
def test_build_takes_the_recipe_that_python_takes(folder: Path, bridge: Any, pairs: Any, recipe: str) -> None:
    assert build(folder, "--recipe", recipe, "--layers", "1") == 0
    wanted = gr.build_vectors(bridge, pairs, recipe=recipe, layers=[1], progress=False)
    assert torch.equal(gr.load_vectors(folder / "v.safetensors", bridge).raw, wanted.raw)


@pytest.mark.parametrize("option", ["--top-k=3", "--method=leave_one_out", "--n-steps=8", "--masker=eos"])
def test_options_that_the_recipe_does_not_have(folder: Path, option: str, capsys: Any) -> None:
    assert build(folder, "--recipe", "caa", option) == 2
    assert "recipe 'caa' takes no" in capsys.readouterr().err
    assert not (folder / "v.safetensors").exists()


def test_steer_does_what_the_file_was_saved_with(folder: Path, bridge: Any, capsys: Any) -> None:
    """A file of ``find`` was steered with alpha 0.3 at its middle layer, whatever had been found."""
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    vectors = gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 5.0), {"method": "test"})
    path = vectors.steering(2.5, [0, 2], operator="add", positions="last").save(folder / "chosen.safetensors")
    say = ["steer", "--vectors", str(path), "--prompt", "the film was", "--max-new-tokens", "6"]
    shown = {}
    for options, steering in (
        ((), vectors.steering(2.5, [0, 2], operator="add", positions="last")),
        (("--alpha", "1"), vectors.steering(1, [0, 2], operator="add", positions="last")),
        (("--layer", "0", "--positions", "all"), vectors.steering(2.5, 0, operator="add")),
    ):
        assert main([*say, *options]) == 0
        shown[options] = capsys.readouterr().out
        text = gr.generate(bridge, ["the film was"], steering, max_new_tokens=6)[0]
        assert " ".join(text.split()) in " ".join(shown[options].split())
    assert "steered: alpha +2.5, layers 0, 2, add, last" in shown[()]
    assert "steered: alpha +1, layers 0, 2, add, last" in shown[("--alpha", "1")]
