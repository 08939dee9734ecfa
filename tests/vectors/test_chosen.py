"""What was chosen travels in the file: layer, alpha, operator, positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import grains_tl as gr
from grains_tl._util.files import plain
from grains_tl.vectors.tensor_files import FORMAT, with_checksum

IDS = torch.tensor([[1, 3, 12, 9, 10]])


def vectors(**info: Any) -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 20.0), {"method": "test", **info})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"operator": "add", "positions": "generated"},
        {"operator": "ablate"},
        {"scale": "raw", "operator": "add"},
        {"operator": "clamp", "positions": "last"},
    ],
)
def test_a_saved_steering_steers_as_before(bridge: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    steering = vectors().steering(-0.3, [0, 2], **options)
    file = steering.save(tmp_path / "v.safetensors")
    again = gr.load_vectors(file, bridge).chosen
    assert again is not None
    assert (again.label, again.layers, again.alpha) == (steering.label, (0, 2), -0.3)
    assert again.key == steering.key
    with torch.no_grad():
        a, b = (bridge.run_with_hooks(IDS, fwd_hooks=s.for_prompt(2)) for s in (steering, again))
    assert torch.equal(a, b)


def test_vectors_without_a_choice_have_none(tmp_path: Path) -> None:
    assert gr.load_vectors(vectors().save(tmp_path / "v.safetensors")).chosen is None


def test_files_written_before_choices_were_kept_load(tmp_path: Path) -> None:
    v = vectors(found={"layer": 1, "alpha": 0.2})
    tensors = {name: getattr(v, name) for name in ("directions", "magnitudes", "resid_norms")}
    old = tmp_path / "old.safetensors"
    old.write_bytes(with_checksum(FORMAT, 2, {**v.info, "layers": [0, 1, 2]}, tensors))
    again = gr.load_vectors(old)
    assert again.chosen is None and again.info["found"]["alpha"] == 0.2


def test_the_choice_is_plain_json(tmp_path: Path) -> None:
    with safe_open(str(vectors().steering(0.2, 1).save(tmp_path / "v.safetensors")), framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    assert manifest["chosen"] == {
        "layers": [1], "alpha": 0.2, "operator": "add_renorm", "positions": "all", "scale": "residual",
    }  # fmt: skip
    assert manifest["layers"] == [1] and manifest["method"] == "test"


def test_other_vectors_made_from_these_have_no_choice() -> None:
    entry = vectors().steering(0.2, 1).choice
    v = vectors(chosen=entry, evidence={"effect": 1.0}, found={"alpha": 0.2})
    assert v.chosen is not None and v.at([1, 2]).chosen is not None
    assert v.at([0]).chosen is None
    for other in (-v, v * 2.0, v + v, v - vectors()):
        assert other.chosen is None and not {"chosen", "evidence", "found"} & set(other.info)


def test_a_gate_that_reads_a_layer_travels_too(bridge: Any, tmp_path: Path) -> None:
    for threshold in (-1e9, 1e9):
        gate = gr.hooks.ProbeGate(torch.linspace(-1, 1, 32), 0, threshold)
        steering = vectors().steering(0.3, [0, 2], gate=gate)
        again = gr.load_vectors(steering.save(tmp_path / "v.safetensors"), bridge).chosen
        assert again is not None and again.key == steering.key and again.label == steering.label
        with torch.no_grad():
            a, b = (bridge.run_with_hooks(IDS, fwd_hooks=s.for_prompt(2)) for s in (steering, again))
            plain = bridge(IDS)
        assert torch.equal(a, b) and torch.equal(a, plain) == (threshold > 0)
    bare = gr.load_vectors(vectors().with_gate(gate).steering(0.3, 1).save(tmp_path / "b.safetensors"))
    assert bare.gate is not None and bare.chosen is not None and bare.chosen.gate is None


@pytest.mark.parametrize("gate", [torch.ones(1, dtype=torch.bool), lambda act: act[..., 0] > 0])
def test_a_gate_or_mask_is_refused(gate: Any, tmp_path: Path) -> None:
    function = gr.hooks.FunctionGate(lambda resid: resid[..., 0] > 0, 0)
    for options in ({"gate": gate}, {"gate": function}, {"positions": torch.ones(1, 5, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=r"gate|mask"):
            vectors().steering(0.2, 1, **options).save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"layers": [1]},
        {"layers": 1, "alpha": 0.2},
        {"layers": [1], "alpha": "much"},
        {"layers": [1], "alpha": float("nan")},
        {"layers": [], "alpha": 0.2},
        {"layers": [1], "alpha": 0.2, "operator": "multiply"},
        [1, 0.2],
        "1",
    ],
)
def test_a_broken_choice_is_an_error_when_it_is_asked_for(entry: Any, tmp_path: Path) -> None:
    json.dumps(entry, default=plain)
    loaded = gr.load_vectors(vectors(chosen=entry).save(tmp_path / "v.safetensors"))
    assert loaded.layers == (0, 1, 2)
    with pytest.raises(ValueError, match="chosen"):
        _ = loaded.chosen
