"""Exports for other programs: lm-evaluation-harness loads its own; EasySteer and vllm-lens by what their sources do."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.vectors.export import export_easysteer, export_gguf, export_steered, vllm_lens_vector
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 3, 12, 9, 10, 7, 22]])
ATOL = 1e-4  # float32 sums in another order, logits of a few units


def vectors(layers: tuple[int, ...] = (0, 1, 2)) -> gr.SteeringVectors:
    raw = torch.randn(len(layers), 32, generator=torch.Generator().manual_seed(1))
    return gr.SteeringVectors.from_raw(raw, layers, torch.linspace(3.0, 5.0, len(layers)), {"method": "test"})


def ours(model: Any, steering: gr.Steering) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(IDS, fwd_hooks=steering.hooks())


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("alpha", "operator"), [(0.3, "add"), (-0.3, "add"), (0.4, "clamp"), (0.0, "clamp"), (1.0, "ablate")]
)
def test_their_steered_model_gives_our_logits(architecture: str, alpha: float, operator: Any, tmp_path: Path) -> None:
    steered = pytest.importorskip("lm_eval.models.hf_steered", reason="lm-eval is not installed")
    model, hf = tiny_model("bridge", architecture), tiny_hf(architecture)
    steering = vectors().steering(alpha, [0, 2], operator=operator)
    file = export_steered(steering, tmp_path / "steered.pt", model)
    theirs = steered.SteeredModel(
        pretrained=hf, steer_path=str(file), tokenizer=tiny_tokenizer(), batch_size=1, max_length=64, device="cpu"
    )
    with torch.no_grad():
        plain = hf(IDS).logits
        found = theirs._model_call(IDS)
    torch.testing.assert_close(found, ours(model, steering), atol=ATOL, rtol=0)
    assert float((found - plain).abs().max()) > 0.01
    request = SimpleNamespace(args=("the film was", " good and we liked it"))
    adapter = gr.evaluate.harness.adapter(model, steering)
    asked = theirs.loglikelihood([request], disable_tqdm=True)[0][0]  # type: ignore[list-item]
    assert adapter.loglikelihood([request])[0][0] == pytest.approx(asked, abs=ATOL)


@pytest.mark.parametrize("source", ["bridge", "plain"])
def test_layers_have_the_names_of_the_model(source: str, tmp_path: Path) -> None:
    for architecture, name in (("llama", "layers.1"), ("gpt2", "h.1")):
        model = tiny_model("bridge", architecture) if source == "bridge" else tiny_hf(architecture)
        steering = vectors().steering(0.3, 1, operator="add")
        file = export_steered(steering, tmp_path / "steered.pt", model)
        assert list(torch.load(file, weights_only=True)) == [name]
        assert name in dict(tiny_hf(architecture).base_model.named_modules())
    assert list(torch.load(export_steered(steering, tmp_path / "s.pth"), weights_only=True)) == ["layers.1"]


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"operator": "add_renorm"}, "v.pt", "as_add"),
        ({"operator": "ablate", "alpha": 0.5}, "v.pt", "ablate"),
        ({"positions": "generated"}, "v.pt", "every position"),
        ({"gate": torch.ones(1, dtype=torch.bool)}, "v.pt", "every position"),
        ({"alpha": 0.0}, "v.pt", "changes nothing"),
        ({}, "v.safetensors", r"\.pt"),
    ],
)
def test_refused_for_lm_eval(change: dict[str, Any], path: str, message: str, tmp_path: Path) -> None:
    options = {"alpha": 0.2, "layers": 1, "operator": "add", **change}
    with pytest.raises(ValueError, match=message):
        export_steered(vectors().steering(options.pop("alpha"), options.pop("layers"), **options), tmp_path / path)
    with pytest.raises(ValueError, match="decoder layers|expected a TransformerBridge"):
        export_steered(vectors().steering(0.2, 1, operator="add"), tmp_path / "v.pt", torch.nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


# -- EasySteer --------------------------------------------------------------------------------------------------------


def their_step(h: Tensor, file: Path, spec: dict[str, Any], layer: int) -> Tensor:
    """What EasySteer's ``direct`` and ``erase`` do to complete hidden states, as its sources have it."""
    rows = {int(t.name.split(".")[1]): torch.from_numpy(np.array(t.data)) for t in GGUFReader(file).tensors}
    assert sorted(rows) == spec["layers"]
    row = rows[layer] * spec["scale"]
    if spec["algorithm"] == "erase":
        return h - (h @ row)[..., None] * row / (row.pow(2).sum() + 1e-8)
    moved = h + row
    if not spec["normalize"]:
        return moved
    return moved * h.norm(dim=-1, keepdim=True) / (moved.norm(dim=-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize(("alpha", "operator"), [(0.3, "add"), (-0.4, "add_renorm"), (1.0, "ablate")])
def test_easysteer_takes_the_same_step(alpha: float, operator: Any, tmp_path: Path) -> None:
    steering = vectors().steering(alpha, [0, 2], operator=operator)
    spec = export_easysteer(steering, tmp_path / "v.gguf")
    h = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for (_, fn), layer in zip(steering.hooks(), (0, 2), strict=True):
        torch.testing.assert_close(their_step(h, tmp_path / "v.gguf", spec, layer), fn(h, hook=None), atol=1e-5, rtol=0)
    said = {n: f.parts[f.data[0]].tobytes() for n, f in GGUFReader(tmp_path / "v.gguf").fields.items()}
    assert said["general.architecture"] == b"controlvector" and said["controlvector.method"] == b"test"
    assert json.loads(said["controlvector.easysteer"]) == {
        "version": 1, "component": "hidden_states", "metadata": {"mapping": []},
    }  # fmt: skip


def test_easysteer_takes_no_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \.gguf"):
        export_easysteer(vectors().steering(0.3, 1), tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


def test_easysteer_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    for options in ({"operator": "clamp"}, {"operator": "ablate"}, {"positions": "prompt"}):
        with pytest.raises(ValueError, match="EasySteer"):
            export_easysteer(vectors().steering(0.3, 1, **options), tmp_path / "v.gguf")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# -- vllm-lens --------------------------------------------------------------------------------------------------------


def test_vllm_lens_adds_the_same_step() -> None:
    steering = vectors().steering(-0.3, [0, 2], operator="add")
    sent = json.loads(json.dumps(vllm_lens_vector(steering)))
    packed = sent["activations"]
    assert "compression" not in packed and packed["original_dtype"] == "torch.float32"
    rows = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"]).reshape(packed["shape"])
    assert sent["layer_indices"] == [0, 2] and sent["scale"] == 1.0 and sent["norm_match"] is False
    for row, (_, fn) in zip(rows, steering.hooks(), strict=True):
        torch.testing.assert_close(torch.tensor(row), fn(torch.zeros(1, 1, 32), hook=None)[0, 0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="as_add"):
        vllm_lens_vector(vectors().steering(0.3, 1))


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, -0.3])
@pytest.mark.parametrize("operator", ["add", "clamp", "ablate", "add_renorm"])
@pytest.mark.parametrize("form", ["steered", "easysteer"])
def test_what_was_chosen_travels_in_these_files_too(alpha: float, operator: Any, form: str, tmp_path: Path) -> None:
    alpha = 1.0 if operator == "ablate" else alpha
    steering = vectors().steering(alpha, [0, 2], operator=operator)
    if form == "steered" and operator != "add_renorm":
        path = export_steered(steering, tmp_path / "v.pt")
    elif form == "easysteer" and operator != "clamp":
        path = Path(export_easysteer(steering, tmp_path / "v.gguf")["source"])
    else:
        pytest.skip(f"{form} has no {operator}")
    again = gr.load_vectors(path)
    assert again.chosen is not None and again.chosen.label == steering.label
    torch.testing.assert_close(again.raw, vectors().at([0, 2]).raw, atol=1e-5, rtol=0)
    h = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for (_, fn), (_, back) in zip(steering.hooks(), again.chosen.hooks(), strict=True):
        torch.testing.assert_close(back(h, hook=None), fn(h, hook=None), atol=1e-5, rtol=0)


def test_a_control_vector_keeps_a_choice_that_its_vectors_have(tmp_path: Path) -> None:
    v = gr.load_vectors(vectors().steering(0.25, 1, operator="add").save(tmp_path / "v.safetensors"))
    for alpha in (1.0, -0.5):
        again = gr.load_vectors(export_gguf(v, tmp_path / "v.gguf", alpha=alpha))
        assert again.chosen is not None and again.chosen.label == "test, alpha +0.25, layer 1, add"
        torch.testing.assert_close(again.directions, v.directions, atol=1e-6, rtol=0)
        torch.testing.assert_close(again.resid_norms, v.resid_norms, atol=1e-5, rtol=0)


# -- from a shell -----------------------------------------------------------------------------------------------------


def test_the_command_takes_the_choice_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = vectors().steering(0.25, 1, operator="add").save(tmp_path / "v.safetensors")
    for form, out in (("steered", "s.pt"), ("easysteer", "e.gguf"), ("vllm-lens", "l.json"), ("vllm", "v.json")):
        arguments = ["export", "--vectors", str(file), "--format", form, "--out", str(tmp_path / out)]
        assert main(arguments) == 0, form
        assert main([*arguments, "--alpha", "0.5"]) == 0
    step = json.loads((tmp_path / "v.json").read_text())["blocks.1.hook_out"]["value"]
    torch.testing.assert_close(torch.tensor(step), 0.5 * 4.0 * vectors().directions[1], atol=1e-6, rtol=0)
    assert gr.load_vectors(tmp_path / "s.pt").chosen.alpha == 0.5  # type: ignore[union-attr]
    assert "alpha +0.25, layer 1, add" in capsys.readouterr().out


def test_the_command_does_not_lose_where_to_steer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renorm = vectors().steering(0.25, 1).save(tmp_path / "r.safetensors")
    generated = vectors().steering(0.25, 1, operator="add", positions="generated").save(tmp_path / "g.safetensors")
    for file in (renorm, generated):
        for form in ("steered", "vllm-lens", "vllm"):
            out = tmp_path / f"{form}.pt"
            assert main(["export", "--vectors", str(file), "--format", form, "--out", str(out)]) == 2
            assert not out.exists()
    assert "every position" in capsys.readouterr().err
    bare = vectors().save(tmp_path / "bare.safetensors")
    assert main(["export", "--vectors", str(bare), "--format", "steered", "--out", str(tmp_path / "b.pt")]) == 2
    assert "--alpha" in capsys.readouterr().err
