"""Vectors of other programs: files as those programs write them, and hostile ones."""

from __future__ import annotations

import contextlib
import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

import grains_tl as gr
from grains_tl.vectors.export import export_gguf
from grains_tl.vectors.foreign import vectors_from, with_resid_norms
from tests.conftest import tiny_model

D = 32
ROWS = {layer: torch.randn(D, generator=torch.Generator().manual_seed(layer)) * (layer + 1) for layer in (1, 2)}


def control_vector(path: Path, rows: dict[Any, Any], architecture: str = "controlvector") -> Path:
    writer = GGUFWriter(str(path), architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(rows))
    for name, row in rows.items():
        writer.add_tensor(f"direction.{name}", np.asarray(row, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(folder: Path, form: str) -> Path:
    """The rows in a file of each form."""
    path = folder / f"v.{form}"
    if form == "gguf":
        return control_vector(path, ROWS)
    if form == "activations":
        torch.save(ROWS, path)
    elif form == "steering_vectors":
        torch.save({"layer_activations": ROWS, "layer_type": "decoder_block"}, path)
    elif form == "steered":
        entries = {
            f"layers.{layer}": {
                "action": "add",
                "steering_coefficient": 2.0,
                "steering_vector": row / 2,
                "bias": None,
            }
            for layer, row in ROWS.items()
        }
        torch.save(entries, path)
    elif form == "steered_list":
        entry = {"action": "add", "steering_coefficient": 0.5, "bias": None}
        torch.save(
            [{"hookpoint": f"model.layers.{k}", "steering_vector": 2 * v, **entry} for k, v in ROWS.items()], path
        )
    elif form == "old_torch":
        torch.save(ROWS, path, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file({f"blocks.{layer}.hook_resid_post": row for layer, row in ROWS.items()}, path)
    elif form == "resid_pre":
        save_file({f"blocks.{layer + 1}.hook_resid_pre": row for layer, row in ROWS.items()}, path)
    elif form == "npz":
        with path.open("wb") as handle:
            arrays: dict[str, Any] = {str(layer): row.numpy() for layer, row in ROWS.items()}
            np.savez(handle, **arrays)
    return path


FORMS = [
    "gguf",
    "activations",
    "steering_vectors",
    "steered",
    "steered_list",
    "old_torch",
    "safetensors",
    "resid_pre",
    "npz",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_each_form_gives_the_rows_that_were_written(tmp_path: Path, form: str) -> None:
    vectors = gr.load_vectors(written(tmp_path, form))
    assert vectors.layers == (1, 2)
    torch.testing.assert_close(vectors.raw, torch.stack([ROWS[1], ROWS[2]]))
    assert not vectors.resid_norms.any(), "nobody has said how large the residuals are"


def test_what_another_program_adds_is_what_the_raw_scale_adds(tmp_path: Path) -> None:
    model = tiny_model("bridge")
    vectors = gr.load_vectors(written(tmp_path, "steered"))
    act = torch.randn(1, 3, D)
    ((name, fn),) = vectors.hooks(1.0, 1, operator="add", scale="raw")
    assert name == "blocks.1.hook_resid_post"
    torch.testing.assert_close(fn(act, hook=None), act + ROWS[1])
    assert gr.generate(model, "the film", vectors.hooks(1.0, 1, scale="raw"), max_new_tokens=2)


def test_without_a_model_alpha_has_no_unit_and_says_so(tmp_path: Path) -> None:
    vectors = gr.load_vectors(written(tmp_path, "gguf"))
    with pytest.raises(ValueError, match=r"load_vectors\(path, model\)"):
        vectors.hooks(0.2, 1)
    with pytest.raises(ValueError, match=r"load_vectors\(path, model\)"):
        export_gguf(vectors, tmp_path / "again.gguf", layers=[1])
    vectors.hooks(0.2, 1, operator="ablate")
    vectors.hooks(0.0, 1)


@pytest.mark.parametrize("kind", ["bridge"])
def test_the_unit_of_alpha_is_the_median_norm_of_the_models_residuals(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    texts = ["the film was great and the food was cold", "a room but not very warm"]
    vectors = with_resid_norms(gr.load_vectors(written(tmp_path, "npz")), model, texts)
    norms: list[torch.Tensor] = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        hidden = model.original_model(ids, output_hidden_states=True).hidden_states
        norms.append(hidden[2][0, 1:].norm(dim=-1))  # the output of block 1
    expected = torch.cat(norms).median()
    torch.testing.assert_close(vectors.resid_norms[0], expected, rtol=1e-4, atol=1e-5)


def test_a_model_given_at_loading_is_measured_and_checked(tmp_path: Path) -> None:
    model = tiny_model("bridge")
    vectors = gr.load_vectors(written(tmp_path, "gguf"), model)
    assert bool((vectors.resid_norms > 0).all())
    vectors.hooks(0.2, 1)
    narrow = control_vector(tmp_path / "narrow.gguf", {1: torch.ones(8)})
    with pytest.raises(ValueError, match="d_model 8"):
        gr.load_vectors(narrow, model)
    high = control_vector(tmp_path / "high.gguf", {1: torch.ones(D), 77: torch.ones(D)})
    with pytest.raises(ValueError, match="layer 77"):
        gr.load_vectors(high, model)


def test_negative_layers_count_from_the_models_last(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "v.gguf", {-1: ROWS[1]})
    with pytest.raises(ValueError, match="give the model"):
        gr.load_vectors(path)
    model = tiny_model("bridge")
    assert gr.load_vectors(path, model).layers == (int(model.cfg.n_layers) - 1,)


def test_an_export_reads_back_with_its_alpha_and_its_model(tmp_path: Path) -> None:
    norms = torch.tensor([3.0, 5.0])
    info = {"method": "caa", "model": {"name": "m", "d_model": D, "n_layers": 9, "n_heads": 1, "d_vocab": 3}}
    before = gr.SteeringVectors.from_raw(torch.stack([ROWS[1], ROWS[2]]), (1, 2), norms, info)
    export_gguf(before, tmp_path / "v.gguf", layers=[1, 2], alpha=0.3)
    after = gr.load_vectors(tmp_path / "v.gguf")
    torch.testing.assert_close(after.resid_norms, norms)
    torch.testing.assert_close(after.directions, before.directions)
    assert after.info["method"] == "caa"
    with pytest.raises(ValueError, match="made for m"):
        gr.load_vectors(tmp_path / "v.gguf", tiny_model("bridge"))


def test_one_tensor_needs_its_layers(tmp_path: Path) -> None:
    rows = torch.stack([ROWS[1], ROWS[2]])
    torch.save(rows, tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", rows.numpy())
    with pytest.raises(ValueError, match="layers="):
        gr.load_vectors(tmp_path / "v.pt")
    for name in ("v.pt", "v.npy"):
        vectors = gr.load_vectors(tmp_path / name, layers=[1, 2])
        torch.testing.assert_close(vectors.raw, rows)
    with pytest.raises(ValueError, match="different layer per row"):
        gr.load_vectors(tmp_path / "v.pt", layers=[1])
    assert vectors_from(ROWS[1], layers=3).layers == (3,)
    with pytest.raises(ValueError, match="leave layers out"):
        gr.load_vectors(written(tmp_path, "npz"), layers=[1, 2])


class Memory:
    """As repeng keeps it: ``directions`` by block."""

    directions: ClassVar = {layer: row.numpy() for layer, row in ROWS.items()}


@pytest.mark.parametrize("given", [Memory(), ROWS, {str(k): v.double() for k, v in ROWS.items()}])
def test_vectors_in_memory(given: Any) -> None:
    torch.testing.assert_close(vectors_from(given).raw, torch.stack([ROWS[1], ROWS[2]]))


def test_empty_rows_are_left_out() -> None:
    assert vectors_from({0: torch.zeros(D), **ROWS}).layers == (1, 2)


def test_clamping_files_keep_the_level_they_clamp_to(tmp_path: Path) -> None:
    entry = {"action": "clamp", "steering_coefficient": 7.0, "steering_vector": ROWS[1], "bias": None}
    torch.save({"layers.1": entry}, tmp_path / "v.pt")
    vectors = gr.load_vectors(tmp_path / "v.pt")
    assert vectors.info["operator"] == "clamp"
    ((_, fn),) = vectors.hooks(1.0, 1, operator="clamp", scale="raw")
    after = fn(torch.randn(1, 3, D), hook=None)
    torch.testing.assert_close(after @ (ROWS[1] / ROWS[1].norm()), torch.full((1, 3), 7.0), rtol=1e-4, atol=1e-4)


class Dangerous:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("old", [True, False])
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"v": Dangerous()}, "v.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="layer_activations"):
        gr.load_vectors("v.pt")
    Path("raw.pkl").write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(ValueError, match="not"):
        gr.load_vectors("raw.pkl")
    np.save("o.npy", np.array([Dangerous()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o\.npy"):
        gr.load_vectors("o.npy")
    assert not Path("was-run").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"1": torch.full((D,), float("nan"))}, r"layers \[1\] have NaN"),
        ({"1": torch.zeros(D)}, "every vector is zero"),
        ({"1": torch.ones(D), "2": torch.ones(D + 1)}, "different widths"),
        ({"1": torch.ones(D), "layers.1": torch.ones(D)}, "two vectors for layer 1"),
        ({"happy": torch.ones(D), "1": torch.ones(D)}, "'happy' names no layer"),
        ({"model.layers.3.mlp": torch.ones(D), "1": torch.ones(D)}, "another place"),
        ({"1": torch.ones(2, D), "2": torch.ones(D)}, r"shape \[2, 32\]"),
        ({"1": "one", "2": torch.ones(D)}, "'1' is a str"),
        ({}, "holds no vectors"),
        ({"1": torch.ones(D, dtype=torch.complex64)}, "complex"),
        ({"layer_activations": ROWS, "layer_type": "mlp"}, "layer_type 'mlp'"),
        (
            {"layers.1": {"action": "clamp", "steering_vector": ROWS[1], "bias": torch.ones(D)}},
            "bias",
        ),
        ({"layers.1": {"action": "rotate", "steering_vector": ROWS[1]}}, "rotate"),
        ([1, 2], "holds a list"),
    ],
)
def test_content_that_cannot_be_used_is_named(rows: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vectors_from(rows)


def test_a_gguf_model_is_not_taken_for_a_vector(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "m.gguf", ROWS, architecture="llama")
    with pytest.raises(ValueError, match="architecture 'llama'"):
        gr.load_vectors(path)


@pytest.mark.parametrize("form", ["gguf", "activations", "old_torch", "safetensors", "npz"])
def test_damaged_files_give_one_kind_of_error(tmp_path: Path, form: str) -> None:
    """Cut anywhere or with bytes changed: the rows as written or a ValueError, quickly."""
    whole = written(tmp_path, form).read_bytes()
    draw = random.Random(0)
    damaged = tmp_path / "damaged"
    for number in range(150):
        if number % 3 == 0:
            content = whole[: draw.randrange(len(whole))]
        else:
            changed = bytearray(whole)
            for _ in range(draw.choice([1, 1, 4, 40])):
                changed[draw.randrange(min(len(whole), 400 if number % 3 == 1 else len(whole)))] = draw.randrange(256)
            content = bytes(changed)
        damaged.write_bytes(content)
        with contextlib.suppress(ValueError):
            gr.load_vectors(damaged)


def test_a_length_in_a_gguf_file_that_promises_too_much_ends_at_once(tmp_path: Path) -> None:
    """An array of 2**60 small numbers kept the library's reader busy for ever."""
    path = control_vector(tmp_path / "v.gguf", ROWS)
    content = bytearray(path.read_bytes())
    place = content.index(b"controlvector.layer_count") + len(b"controlvector.layer_count")
    content[place : place + 4] = (9).to_bytes(4, "little")  # an array
    content[place + 4 : place + 8] = (0).to_bytes(4, "little")  # of uint8
    content = content[: place + 8] + (2**60).to_bytes(8, "little") + content[place + 8 :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="readable GGUF"):
        gr.load_vectors(path)
