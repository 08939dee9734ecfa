"""What must not change from one release to the next: files, keys, columns, commands and numbers of release 0.1."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import grains_tl as gr
from grains_tl.cli.main import main

HERE = Path(__file__).parent / "golden"
GOLDEN: dict[str, Any] = json.loads((HERE / "golden.json").read_text())
ROWS = [
    ("the soup was cold but the room was warm . overall it was", " great", " awful"),
    ("the film was good", " and we liked it", " but they hated this film"),
    ("question : was the food bad ? answer :", " yes", " no it was good"),
    ("this hotel was very bad and cold", " . we hated it", " . we liked it"),
]
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "top_k_1_eos": {"top_k": 1, "mask": "eos"},
    "words": {"top_k": 1, "group_by": "word"},
    "mean_objective": {"objective": "mean"},
    "attention_mask": {"mask": "attention"},
    "leave_k_out": {"method": "leave_k_out", "n_steps": 16, "k": 2, "seed": 3},
    "ig_adaptive": {"method": "integrated_gradients", "n_steps": 16},
    "ig_paper": {
        "method": "integrated_gradients",
        "n_steps": 8,
        "reference": "zero",
        "nodes": "gauss_legendre",
    },
    "expected_gradients": {"method": "expected_gradients", "n_steps": 6, "seed": 1},
    "gradient_x_input_layer": {"method": "gradient_x_input", "layer": 1},
}


@pytest.fixture(scope="module")
def records() -> list[gr.PreferencePair]:
    return [gr.PreferencePair(prompt=p, chosen=c, rejected=r) for p, c, r in ROWS]


def close(found: Any, wanted: Any) -> None:
    """Equal up to the round-off between machines; on the machine that wrote the files it is bit for bit."""
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_keys_and_numbers(bridge: Any, records: list[gr.PreferencePair], name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gaps of a random model
        vectors = gr.build_vectors(bridge, records, **{"top_k": 2, **CASES[name]}, checkpoint=path, progress=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in rows] == GOLDEN["keys"][name]
    close(rows[0]["scores"], GOLDEN["scores"][name])
    for part, numbers in GOLDEN["vectors"][name].items():
        close(getattr(vectors, part), numbers)


OLD: dict[str, Any] = {
    "top_k": 1,
    "masker": "eos",
    "n_steps": 8,
    "baseline": "zero",
    "method_options": {"nodes": "riemann"},
}


def test_keywords_of_release_0_1_still_work(bridge: Any, records: list[gr.PreferencePair]) -> None:
    names: Any = {"method": "integrated_gradients", "progress": False}
    now = gr.build_vectors(bridge, records, top_k=1, mask="eos", n_steps=8, reference="zero", nodes="riemann", **names)
    with pytest.warns(DeprecationWarning, match="next release; write") as said:
        before = gr.build_vectors(bridge, records, **OLD, **names)
    assert torch.equal(before.directions, now.directions)
    old = {str(w.message).partition("=")[0] for w in said if w.category is DeprecationWarning}
    assert old == {"masker", "baseline", "method_options"}


@pytest.mark.parametrize("version", [1, 2])
def test_vector_files_of_both_formats(version: int) -> None:
    vectors = gr.load_vectors(HERE / f"vectors_v{version}.safetensors")
    for part, numbers in GOLDEN["vectors"]["default"].items():
        assert getattr(vectors, part).tolist() == torch.tensor(numbers).tolist()


def test_files_are_written_as_before(tmp_path: Path) -> None:
    path = gr.load_vectors(HERE / "vectors_v2.safetensors").save(tmp_path / "again.safetensors")
    with safe_open(path, "pt") as new, safe_open(HERE / "vectors_v2.safetensors", "pt") as old:
        assert new.metadata() == old.metadata()  # the checksum of manifest and tensors among it
        assert set(new.keys()) == set(old.keys())


def test_sweep(bridge: Any, records: list[gr.PreferencePair], tmp_path: Path) -> None:
    vectors = gr.build_vectors(bridge, records, top_k=2, progress=False)
    texts = ["the film was good", "it was cold and the food was bad"]
    path = tmp_path / "s.jsonl"
    frame = gr.sweep(
        bridge, vectors, records, layers=[0, 2], alphas=[-0.2, 0.2], neutral=texts, checkpoint=path, progress=False
    )
    assert [c for c in frame.columns if c in GOLDEN["sweep"]["columns"]] == GOLDEN["sweep"]["columns"]
    close(frame["effect"].tolist(), GOLDEN["sweep"]["effect"])
    close(frame["kl"].tolist(), GOLDEN["sweep"]["kl"])
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in rows] == GOLDEN["sweep"]["keys"]
    assert header == GOLDEN["sweep"]["header"]


def test_attribution(bridge: Any, records: list[gr.PreferencePair]) -> None:
    a = gr.attribute(bridge, records[0], method="integrated_gradients", n_steps=16)
    assert a.tokens == GOLDEN["attribute"]["tokens"]
    close(a.scores, GOLDEN["attribute"]["scores"])
    close(a.gap, GOLDEN["attribute"]["gap"])


@pytest.mark.parametrize("name", GOLDEN["public_names"])
def test_old_names_work_and_name_the_new_place(name: str) -> None:
    if name in gr.__all__:
        assert getattr(gr, name) is not None
        return
    with pytest.warns(DeprecationWarning, match=rf"gr\.{name} is gr\.\w+"):
        assert getattr(gr, name) is not None


def test_a_name_that_never_was() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'atribute'"):
        _ = gr.atribute  # type: ignore[attr-defined]


def test_commands_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, set[str]] = {}

    def walk(parser: argparse.ArgumentParser, prefix: str = "") -> None:
        found[prefix or "grains-tl"] = {o for action in parser._actions for o in action.option_strings}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    walk(sub, f"{prefix} {name}".strip())

    def grab(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        walk(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", grab)
    with pytest.raises(SystemExit):
        main(["demo"])
    for command, options in GOLDEN["commands"].items():
        assert set(options) <= found[command], command
