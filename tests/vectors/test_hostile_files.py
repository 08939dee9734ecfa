"""Files that were cut, overwritten or made up: vectors come back whole, or a ValueError says what is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grains_tl as gr
from grains_tl.vectors.tensor_files import FORMAT, with_checksum

FORMS = ("saved", "gguf", "easysteer", "steered")
QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def vectors(**info: Any) -> gr.SteeringVectors:
    raw = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, (1, 2), torch.full((2,), 4.0), {"method": "test", **info})


def written(form: str, folder: Path) -> Path:
    steering = vectors().steering(0.3, [1, 2], operator="add")
    if form == "saved":
        return steering.save(folder / "v.safetensors")
    if form == "gguf":
        return gr.export.export_gguf(vectors(chosen=steering.choice), folder / "v.gguf", layers=[1, 2])
    if form == "easysteer":
        return Path(gr.export.export_easysteer(steering, folder / "e.gguf")["source"])
    return gr.export.export_steered(steering, folder / "s.pt")


def loads_or_says(path: Path) -> None:
    try:
        found = gr.load_vectors(path)
    except (ValueError, FileNotFoundError):
        return
    norms = found.directions.float().norm(dim=-1)
    assert bool(torch.isfinite(found.raw).all()) and bool(((norms - 1).abs() < 1e-3).all())
    try:
        chosen = found.chosen
    except ValueError:
        return
    if chosen is not None:
        assert torch.isfinite(chosen.hooks()[0][1](torch.ones(1, 2, found.directions.shape[1]), hook=None)).all()


@pytest.mark.parametrize("form", FORMS)
@QUICK
@given(place=st.floats(0, 1), value=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_damaged_files(
    form: str, place: float, value: bytes, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = written(form, folder)
    content = path.read_bytes()
    at = int(place * len(content))
    path.write_bytes(content[:at] if cut else content[:at] + value + content[at + len(value) :])
    loads_or_says(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("1"), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["chosen", "sizes", "alpha", "model", "gate", "evidence", "layers", "method"])


@QUICK
@given(changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_made_up_manifests(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("made_up")
    v = vectors()
    path = folder / "v.safetensors"
    tensors = {name: getattr(v, name) for name in ("directions", "magnitudes", "resid_norms")}
    path.write_bytes(with_checksum(FORMAT, 2, {"layers": [1, 2], **v.info, **changes}, tensors))
    loads_or_says(path)
    steered = torch.load(written("steered", folder), weights_only=True)
    for entry in steered.values():
        entry["manifest"] = json.dumps({**json.loads(entry["manifest"]), **changes})
    torch.save(steered, folder / "s.pt")
    loads_or_says(folder / "s.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"steering_vector": torch.full((8,), float("nan"))},
        {"steering_vector": torch.ones(9)},
        {"steering_vector": "a string"},
        {"steering_coefficient": float("inf")},
        {"steering_coefficient": "much"},
        {"action": "multiply"},
        {"action": "clamp", "bias": torch.ones(8)},
        {"manifest": "no json", "steering_coefficient": 0.0},
    ],
)
def test_steered_entries_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    entry = {"steering_vector": torch.ones(8), "steering_coefficient": 2.0, "action": "add", "bias": None}
    content = {"layers.1": entry, "layers.2": {**entry, **change}}
    if "manifest" in change:
        content.pop("layers.1")
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt"):
        gr.load_vectors(tmp_path / "s.pt")


def test_a_code_in_a_file_never_runs(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in ({"layers.1": Touch()}, {"layers.1": {"steering_vector": torch.ones(8), "manifest": Touch()}}):
        torch.save(content, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="pickled"):
            gr.load_vectors(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_former_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(form, tmp_path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left") as caught:
            written(form, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
