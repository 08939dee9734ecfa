"""From differences to vectors: reductions against numpy and scikit-learn, signs as a theorem, arithmetic and files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sklearn.decomposition import PCA
from torch import Tensor

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.vectors.tensor_files import FORMAT
from tests.conftest import TL_MAJOR, tiny_model

ATOL = 1e-5  # unit vectors, reduced in float64 and kept in float32
LAYERS = (4, 7)


def differences(n_records: int = 9, d_model: int = 6, seed: int = 0, shift: float = 0.5) -> gr.vectors.Differences:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(n_records, 2, d_model, generator=generator) + shift
    down = torch.randn(n_records, 2, d_model, generator=generator) - shift
    return gr.vectors.Differences(up, down, LAYERS, torch.tensor([50.0, 80.0]))


def vectors(raw: Tensor | None = None, info: dict[str, Any] | None = None) -> gr.SteeringVectors:
    raw = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]) if raw is None else raw
    return gr.SteeringVectors.from_raw(raw, LAYERS[: len(raw)], torch.full((len(raw),), 50.0), info)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


# -- reduction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["both", "toward_chosen"])
def test_mean(side: Any) -> None:
    d = differences()
    found = gr.vectors.reduce_vectors(d, reduce="mean", side=side)
    wanted = d.toward_chosen.numpy().mean(0) - (d.toward_rejected.numpy().mean(0) if side == "both" else 0)
    np.testing.assert_allclose(found.raw.numpy(), wanted, atol=ATOL)
    np.testing.assert_allclose(found.magnitudes.numpy(), np.linalg.norm(wanted, axis=-1), atol=ATOL)
    np.testing.assert_allclose(found.directions.norm(dim=-1).numpy(), 1, atol=ATOL)
    assert found.layers == LAYERS and torch.equal(found.resid_norms, d.resid_norms)


@pytest.mark.parametrize("side", ["both", "toward_chosen"])
def test_svd(side: Any) -> None:
    d = differences()
    found = gr.vectors.reduce_vectors(d, reduce="svd", side=side)
    per_record = d.toward_chosen.numpy() - (d.toward_rejected.numpy() if side == "both" else 0)
    for row in range(2):
        _, _, right = np.linalg.svd(per_record[:, row])
        mean = per_record[:, row].mean(0)
        wanted = right[0] * np.sign(right[0] @ mean)
        np.testing.assert_allclose(found.directions[row].numpy(), wanted, atol=ATOL)
        assert found.magnitudes[row].item() == pytest.approx(
            float(wanted @ mean), abs=ATOL
        )  # length along the direction


@pytest.mark.parametrize("side", ["both", "toward_chosen"])
def test_pca(side: Any) -> None:
    """The paper's: scikit-learn's first components, each turned to its own mean, subtracted; then the sign of the result."""
    d = differences()
    found = gr.vectors.reduce_vectors(d, reduce="pca", side=side)
    for row in range(2):
        parts = []
        for side_ in (d.toward_chosen, d.toward_rejected):
            component = PCA(n_components=1).fit(side_[:, row].numpy()).components_[0]
            parts.append(component * np.sign(component @ side_[:, row].numpy().mean(0)))
        raw = parts[0] - parts[1] if side == "both" else parts[0]
        mean = (d.toward_chosen - (d.toward_rejected if side == "both" else 0))[:, row].numpy().mean(0)
        np.testing.assert_allclose(found.directions[row].numpy(), unit(raw) * np.sign(raw @ mean), atol=ATOL)


def test_reductions_differ() -> None:
    d = differences(shift=0.1)
    found = [gr.vectors.reduce_vectors(d, reduce=r) for r in ("mean", "svd", "pca")]  # type: ignore[arg-type]
    assert max(float(a.cosine(b).max()) for a in found for b in found if a is not b) < 0.999


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n_records=st.integers(2, 12),
    shift=st.floats(-1, 1),
    reduce=st.sampled_from(["mean", "svd", "pca"]),
    side=st.sampled_from(["both", "toward_chosen"]),
)
def test_vectors_never_point_away_from_the_mean_difference(
    seed: int, n_records: int, shift: float, reduce: Any, side: Any
) -> None:
    d = differences(n_records, seed=seed, shift=shift)
    found = gr.vectors.reduce_vectors(d, reduce=reduce, side=side)
    mean = (d.toward_chosen - (d.toward_rejected if side == "both" else 0)).mean(0)
    assert ((found.directions * mean).sum(-1) >= -ATOL).all()
    assert (found.magnitudes > 0).all()
    torch.testing.assert_close(found.directions.norm(dim=-1), torch.ones(2), atol=ATOL, rtol=0)


@pytest.mark.parametrize("reduce", ["mean", "svd", "pca"])
def test_swapping_the_sides_turns_the_vector_round(reduce: Any) -> None:
    d = differences()
    swapped = gr.vectors.Differences(d.toward_rejected, d.toward_chosen, d.layers, d.resid_norms)
    torch.testing.assert_close(
        gr.vectors.reduce_vectors(swapped, reduce=reduce).directions,
        -gr.vectors.reduce_vectors(d, reduce=reduce).directions,
        atol=ATOL,
        rtol=0,
    )


@pytest.mark.parametrize("reduce", ["mean", "svd"])
def test_one_record_is_its_own_difference(reduce: Any) -> None:
    d = differences(n_records=1)
    wanted = (d.toward_chosen - d.toward_rejected)[0]
    found = gr.vectors.reduce_vectors(d, reduce=reduce)
    torch.testing.assert_close(found.raw, wanted, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_refused_reductions() -> None:
    with pytest.raises(ValueError, match="needs at least 2 records, 1 given"):
        gr.vectors.reduce_vectors(differences(n_records=1), reduce="pca")
    with pytest.raises(ValueError, match="median"):
        gr.vectors.reduce_vectors(differences(), reduce="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="left"):
        gr.vectors.reduce_vectors(differences(), side="left")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["both", "toward_chosen"])
@pytest.mark.parametrize("reduce", ["mean", "svd", "pca"])
def test_a_zero_difference_has_no_direction(reduce: Any, side: Any) -> None:
    d = differences()
    d.toward_chosen[:, 1], d.toward_rejected[:, 1] = 0, 0
    with pytest.raises(ValueError, match=r"layers \[7\]"):
        gr.vectors.reduce_vectors(d, reduce=reduce, side=side)


# -- the class --------------------------------------------------------------------------------------------------------


def test_from_raw_splits_length_and_direction() -> None:
    v = vectors()
    assert v.magnitudes.tolist() == [5.0, 2.0]
    torch.testing.assert_close(v.directions, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(v.raw, torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_from_raw_names_the_layer_without_direction(bad: float) -> None:
    with pytest.raises(ValueError, match=r"layers \[7\] is zero or not finite"):
        vectors(torch.tensor([[1.0, 0.0], [bad, bad]]))


@pytest.mark.parametrize("row", [[2.0, 0.0], [0.0, 0.0], [float("nan"), 0.0]])
def test_directions_must_be_unit_vectors(row: list[float]) -> None:
    with pytest.raises(ValueError, match=r"layers \[7\]"):
        gr.SteeringVectors(torch.tensor([[1.0, 0.0], row]), LAYERS, torch.ones(2), torch.ones(2))


@pytest.mark.usefixtures("unchecked")
def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="3 layers need"):
        gr.SteeringVectors(torch.eye(2), (1, 2, 3), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="2 layers need"):
        gr.SteeringVectors(torch.eye(2), (1, 2), torch.ones(3), torch.ones(2))


def test_arithmetic() -> None:
    a, b = vectors(), vectors(torch.tensor([[1.0, -1.0, 0.0], [0.0, 5.0, 1.0]]))
    torch.testing.assert_close((a + b).raw, a.raw + b.raw)
    torch.testing.assert_close((a - b).raw, a.raw - b.raw)
    torch.testing.assert_close((2.0 * a).raw, 2 * a.raw)
    torch.testing.assert_close((a * -0.5).directions, -a.directions)
    torch.testing.assert_close((-a).raw, -a.raw)
    torch.testing.assert_close(a.cosine(b), torch.tensor([-1 / (5 * 2**0.5), 1 / 26**0.5]))
    torch.testing.assert_close(a.cosine(-a), -torch.ones(2))
    with pytest.raises(ValueError, match="zero or not finite"):
        gr.SteeringVectors.from_raw(torch.zeros(2, 3), [4, 7], torch.ones(2))


def test_arithmetic_of_other_layers_is_refused() -> None:
    a = vectors()
    with pytest.raises(ValueError, match=r"layers \[4, 7\] x d_model 3 and layers \[4\]"):
        a + a.at([4])
    torch.testing.assert_close((a.at([4]) + a.at([4])).raw, 2 * a.raw[:1])


def test_at_takes_layers_in_the_order_given() -> None:
    v = vectors().at([7, 4])
    assert v.layers == (7, 4) and v.magnitudes.tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match=r"no vector for layer 5; stored are \[4, 7\]"):
        vectors().at([5])


def test_alpha_counts_residual_norms_or_own_lengths() -> None:
    v, act = vectors(), torch.zeros(1, 2, 3)
    ((name, fn),) = v.hooks(0.2, [7], operator="add")
    assert name == "blocks.7.hook_resid_post"
    torch.testing.assert_close(fn(act, hook=None)[0, 0], torch.tensor([0.0, 0.0, 0.2 * 50.0]))
    ((_, fn),) = v.hooks(0.5, [4], operator="add", scale="raw")
    torch.testing.assert_close(fn(act, hook=None)[0, 1], 0.5 * v.raw[0])
    assert [n for n, _ in v.hooks(0.2, [4, 7])] == ["blocks.4.hook_resid_post", "blocks.7.hook_resid_post"]
    assert len(v.at([4]).hooks(0.2)) == 1
    ((_, fn),) = v.hooks(1.0, [7], operator="ablate")  # a share, whatever the norms
    assert fn(torch.ones(1, 1, 3), hook=None).tolist() == [[[1.0, 1.0, 0.0]]]
    ((_, fn),) = v.hooks(0.1, [7], operator="clamp")
    torch.testing.assert_close(fn(torch.ones(1, 1, 3), hook=None), torch.tensor([[[1.0, 1.0, 5.0]]]))


@pytest.mark.usefixtures("unchecked")
def test_refused_hooks() -> None:
    v = vectors()
    with pytest.raises(ValueError, match=r"name the layers to steer.*\[4, 7\]"):
        v.hooks(0.2)
    with pytest.raises(ValueError, match="no vector for layer 5"):
        v.hooks(0.2, [5])
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            v.hooks(alpha, [4])
    with pytest.raises(ValueError, match="metres"):
        v.hooks(0.2, [4], scale="metres")  # type: ignore[arg-type]


# -- files ------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    info = {"method": "leave_one_out", "top_k": 3, "nested": {"seed": None, "list": [1, 2.5]}}
    v = vectors(info=info)
    path = v.save(tmp_path / "deep" / "er" / "v.safetensors")
    again = gr.load_vectors(path)
    for name in ("directions", "magnitudes", "resid_norms"):
        assert torch.equal(getattr(again, name), getattr(v, name))
    assert again.layers == v.layers and dict(again.info) == info
    assert gr.load_vectors(str(again.save(path))).layers == v.layers  # overwriting is fine


def test_file_is_plain_safetensors_with_its_manifest(tmp_path: Path) -> None:
    path = vectors(info={"top_k": 3}).save(tmp_path / "v.safetensors")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert header["format"] == FORMAT
    manifest = json.loads(header["manifest"])
    assert manifest["layers"] == [4, 7] and manifest["top_k"] == 3
    assert manifest["hook_point"] == "blocks.{layer}.hook_resid_post"
    assert set(load(content)) == {"directions", "magnitudes", "resid_norms"}


def test_files_of_vectors_taken_from_larger_ones(tmp_path: Path) -> None:
    """Views and other orders of rows are stored as they are seen."""
    v = vectors().at([7])
    assert torch.equal(gr.load_vectors(v.save(tmp_path / "v")).directions, v.directions)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    path = vectors().save(tmp_path / "v.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"v\.safetensors"):
        gr.load_vectors(path)


def stored(path: Path, *, drop: str = "", **metadata: str) -> Path:
    """A vector file with some parts wrong."""
    v = vectors()
    tensors = {"directions": v.directions, "magnitudes": v.magnitudes, "resid_norms": v.resid_norms}
    tensors.pop(drop, None)
    header = {"format": FORMAT, "version": "1", "manifest": json.dumps({"layers": [4, 7]}), **metadata}
    path.write_bytes(save(tensors, metadata={k: value for k, value in header.items() if value}))
    return path


def test_the_helper_writes_a_good_file(tmp_path: Path) -> None:
    assert gr.load_vectors(stored(tmp_path / "v")).layers == LAYERS


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something else"}, "something else"),
        ({"format": ""}, "None"),
        ({"version": "4"}, "version 4"),
        ({"drop": "magnitudes"}, "magnitudes"),
        ({"manifest": json.dumps({"layers": [4]})}, "layers"),
        ({"manifest": json.dumps({})}, r"v\.safetensors"),
        ({"manifest": "{"}, r"v\.safetensors"),
        ({"manifest": ""}, r"v\.safetensors"),
        ({"version": "new"}, r"v\.safetensors"),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = stored(tmp_path / "v.safetensors", **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        gr.load_vectors(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        gr.load_vectors(tmp_path / "none")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vectors().save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                (vectors() * 3.0).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]  # and nothing beside it
    (vectors() * 3.0).save(path)
    assert path.read_bytes() != before


def test_info_that_cannot_be_stored_leaves_the_old_file(tmp_path: Path) -> None:
    path = vectors().save(tmp_path / "v.safetensors")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        vectors(info={"model": object()}).save(path)
    assert path.read_bytes() == before


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "v", b"x")
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


# -- which model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> SimpleNamespace:
    model = tiny_model()
    pairs = [
        gr.PreferencePair("film was very", " good", " bad"),
        gr.PreferencePair("cold soup but", " great", " awful"),
    ]
    return SimpleNamespace(model=model, vectors=gr.build_vectors(model, pairs, top_k=1, progress=False))


def test_vectors_load_for_their_own_model(built: Any, tmp_path: Path) -> None:
    path = built.vectors.save(tmp_path / "v")
    assert torch.equal(gr.load_vectors(path, tiny_model()).directions, built.vectors.directions)


@pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")
def test_vectors_load_for_the_other_class(built: Any, tmp_path: Path) -> None:
    gr.load_vectors(built.vectors.save(tmp_path / "v"), tiny_model("hooked"))


def test_vectors_load_for_another_dtype(built: Any) -> None:
    built.vectors.require_match(tiny_model().to(torch.bfloat16))


def test_another_shape_is_named(built: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_layers: 5 -> 3"):
        info = {**built.vectors.info, "model": {**built.vectors.info["model"], "n_layers": 5}}
        path = gr.SteeringVectors.from_raw(torch.eye(32)[:1], [0], torch.ones(1), info).save(tmp_path / "v")
        gr.load_vectors(path, built.model)


def test_other_weights_of_the_same_shape_are_refused(built: Any, tmp_path: Path) -> None:
    other = tiny_model()
    embedding = other.original_model.get_input_embeddings().weight
    embedding.copy_(embedding * 1.1)
    with pytest.raises(ValueError, match="the weights"):
        gr.load_vectors(built.vectors.save(tmp_path / "v"), other)


def test_vectors_of_unknown_origin_must_fit_by_shape(built: Any) -> None:
    gr.SteeringVectors.from_raw(torch.eye(32)[:1], [2], torch.ones(1)).require_match(built.model)
    for raw, layer in ((torch.eye(32)[:1], 3), (torch.eye(16)[:1], 0)):
        with pytest.raises(ValueError, match="do not fit tiny"):
            gr.SteeringVectors.from_raw(raw, [layer], torch.ones(1)).require_match(built.model)
