"""Readers meet damaged and hostile files: they refuse them or read what is sound, never anything else, and run no code."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import grains_tl as gr
from grains_tl._util.store import sealed_line, unsealed
from grains_tl.evaluate.store import open_checkpoint
from grains_tl.records.steering_sets import FORMS
from grains_tl.vectors.tensor_files import FORMAT
from studies.tiny_vlm.state_file import load_state, save_state
from tests.helpers.attributing import attribute_records

pytestmark = pytest.mark.usefixtures("unchecked")  # our own messages, not the run-time shape checks
MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
READS = (ValueError, KeyError)  # what every reader promises; anything else is a crash
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
#: Rows that look like records, with one thing or another in each cell.
ROW = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "image", "question", "choices", "answer"), JSON)
)
#: Rows of SteerEval and SteeringSafety: all columns of one set, with anything in the cells.
SET_ROW = st.sampled_from([("question", "matching", "not_matching"), *FORMS]).flatmap(
    lambda names: st.fixed_dictionaries(dict.fromkeys(names, JSON | st.sampled_from(["A. x\nB. y", "B", 1])))
)
PATCH = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


def patched(content: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    """Some bytes replaced, the end cut off."""
    out = bytearray(content)
    for where, byte in changes:
        out[int(where * len(out))] = byte
    return bytes(out[: int(len(out) * cut)])


def quiet(read: Any, *args: Any) -> Any:
    """The result, or None where it is refused as promised."""
    with warnings.catch_warnings(), contextlib.suppress(*READS):
        warnings.simplefilter("ignore")
        return read(*args)
    return None


# -- records and benchmarks --------------------------------------------------------------------------------------------


@MANY
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_any_bytes_as_records(ending: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"p.{ending}"
    path.write_bytes(content)
    quiet(gr.load_pairs, path)


@MANY
@given(rows=st.lists(ROW | JSON, max_size=4))
def test_any_json_as_records(rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = quiet(gr.load_pairs, path)
    for pair in found or []:
        assert pair.prompt and pair.chosen != pair.rejected


@MANY
@given(cells=st.lists(st.lists(st.text(max_size=12), min_size=3, max_size=3), min_size=1, max_size=4))
def test_what_csv_writes_is_read_back(cells: list[list[str]], tmp_path: Path) -> None:
    """Python's own writer is the oracle: every text comes back, or is refused for a reason of its own."""
    import csv

    path = tmp_path / "p.csv"
    with path.open("w", encoding="utf-8", newline="", errors="surrogatepass") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["prompt", "chosen", "rejected"], *cells])
    found = quiet(gr.load_pairs, path)
    if found is not None:
        assert [[p.prompt, p.chosen, p.rejected] for p in found] == cells


@MANY
@given(rows=st.lists(ROW | SET_ROW, min_size=1, max_size=3))
@pytest.mark.parametrize(
    "name", ["truthfulqa", "toxigen", "faitheval", "mmlu", "anthropic", "steereval", "steeringsafety"]
)
def test_any_rows_as_benchmark(name: str, rows: list[dict[str, Any]]) -> None:
    quiet(gr.records.load_benchmark, name, rows)


# -- vectors -----------------------------------------------------------------------------------------------------------


def vectors() -> gr.SteeringVectors:
    raw = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, [1, 3], torch.tensor([4.0, 5.0]), {"method": "test", "top_k": 4})


@MANY
@given(changes=PATCH, cut=st.just(1.0) | st.floats(0, 1))
def test_damaged_vectors_are_never_read_as_others(changes: list[tuple[float, int]], cut: float, tmp_path: Path) -> None:
    wanted, path = vectors(), tmp_path / "v.safetensors"
    wanted.save(path)
    path.write_bytes(patched(path.read_bytes(), changes, cut))
    found = quiet(gr.load_vectors, path)
    if found is not None:  # a change that says the same: another byte in the header's padding, or the same byte
        assert torch.equal(found.directions, wanted.directions) and dict(found.info) == dict(wanted.info)
        assert torch.equal(found.resid_norms, wanted.resid_norms) and found.layers == wanted.layers


def test_every_single_bit_of_a_vector_file_counts(tmp_path: Path) -> None:
    wanted, path = vectors(), tmp_path / "v.safetensors"
    content = wanted.save(path).read_bytes()
    refused = 0
    for place in range(0, len(content) * 8, 7):
        out = bytearray(content)
        out[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(out))
        found = quiet(gr.load_vectors, path)
        refused += found is None
        assert found is None or (torch.equal(found.raw, wanted.raw) and dict(found.info) == dict(wanted.info))
    assert refused > 0.9 * len(range(0, len(content) * 8, 7))


@MANY
@given(manifest=JSON, layers=JSON)
def test_any_manifest(manifest: Any, layers: Any, tmp_path: Path) -> None:
    v = vectors()
    text = json.dumps({**manifest, "layers": layers} if isinstance(manifest, dict) else manifest)
    tensors = {"directions": v.directions, "magnitudes": v.magnitudes, "resid_norms": v.resid_norms}
    path = tmp_path / "v.safetensors"
    path.write_bytes(save(tensors, metadata={"format": FORMAT, "version": "1", "manifest": text}))
    found = quiet(gr.load_vectors, path)
    assert found is None or len(found.layers) == 2


@pytest.mark.parametrize("name", ["directions", "magnitudes", "resid_norms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, "shape"])
def test_numbers_that_cannot_be(name: str, bad: Any, tmp_path: Path) -> None:
    v = vectors()
    tensors = {"directions": v.directions, "magnitudes": v.magnitudes, "resid_norms": v.resid_norms}
    tensors[name] = tensors[name][:1] if bad == "shape" else torch.full_like(tensors[name], bad)
    path = tmp_path / "v.safetensors"
    header = {"format": FORMAT, "version": "1", "manifest": json.dumps({"layers": [1, 3]})}
    path.write_bytes(save({k: t.contiguous() for k, t in tensors.items()}, metadata=header))
    with pytest.raises(ValueError, match="v.safetensors has a broken manifest or tensors"):
        gr.load_vectors(path)


def test_files_of_version_1_are_still_read(tmp_path: Path) -> None:
    v = vectors()
    tensors = {"directions": v.directions, "magnitudes": v.magnitudes, "resid_norms": v.resid_norms}
    manifest = json.dumps({**v.info, "layers": [1, 3], "hook_point": "blocks.{layer}.hook_resid_post"})
    path = tmp_path / "v.safetensors"
    path.write_bytes(save(tensors, metadata={"format": FORMAT, "version": "1", "manifest": manifest}))
    found = gr.load_vectors(path)
    assert torch.equal(found.directions, v.directions) and dict(found.info) == dict(v.info)


# -- finished results --------------------------------------------------------------------------------------------------


@given(row=st.dictionaries(st.text(max_size=5), JSON, max_size=4), at=st.floats(0, 1, exclude_max=True))
@settings(max_examples=300, deadline=None)
def test_a_changed_line_is_not_a_row(row: dict[str, Any], at: float) -> None:
    row.pop("crc", None)
    line = sealed_line(row)
    assert json.dumps(unsealed(line)) == json.dumps(row)
    digits = [i for i, c in enumerate(line) if c in "0123456789"]
    place = digits[int(at * len(digits))]  # the checksum itself has digits
    other = line[:place] + str((int(line[place]) + 1) % 10) + line[place + 1 :]
    found = unsealed(other)
    assert found is None or json.dumps(found) == json.dumps(row)


@settings(MANY, max_examples=100)
@given(changes=PATCH, cut=st.just(1.0) | st.floats(0, 1))
def test_damaged_checkpoints_of_sweeps(
    changes: list[tuple[float, int]], cut: float, tmp_path: Path, bridge: Any
) -> None:
    path = tmp_path / "c.jsonl"
    path.unlink(missing_ok=True)
    rows = {f"{i:016x}": [float(i), -1.5] for i in range(4)}
    open_checkpoint(path, bridge).append([(key, values, {"layer": 1}) for key, values in rows.items()])
    path.write_bytes(patched(path.read_bytes(), changes, cut))
    store = quiet(open_checkpoint, path, bridge)
    if store is not None:
        assert store.rows.items() <= rows.items()  # what is read is what was written
        store.append([("new", [3.0], {})])
        again = open_checkpoint(path, bridge)
        assert again.rows == {**store.rows}


@settings(MANY, max_examples=12)
@given(changes=PATCH, cut=st.just(1.0) | st.floats(0, 1))
def test_damaged_checkpoints_of_builds(
    changes: list[tuple[float, int]], cut: float, tmp_path: Path, bridge: Any, pairs: list[gr.PreferencePair]
) -> None:
    options = {
        "method": "leave_one_out",
        "n_steps": 1,
        "reference": None,
        "objective": "sum",
        "mask": "mean_embedding",
    }
    path, tokenized = tmp_path / "c.jsonl", gr.tokens.tokenize_pairs(bridge, pairs[:2])
    path.unlink(missing_ok=True)
    wanted = attribute_records(bridge, tokenized, options, checkpoint=path)
    damaged = patched(path.read_bytes(), changes, cut)
    path.write_bytes(damaged)
    try:
        found = attribute_records(bridge, tokenized, options, checkpoint=path)
    except ValueError as error:  # nothing is left that says whose file it is: refused, and left as it is
        assert "is not a checkpoint of attributions" in str(error) and path.read_bytes() == damaged
        return
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a.scores, b.scores, equal_nan=True)


def test_checkpoints_of_version_1_are_still_read(tmp_path: Path, bridge: Any) -> None:
    path = tmp_path / "c.jsonl"
    open_checkpoint(path, bridge)
    header = json.loads(path.read_text())
    assert header["version"] == 2
    path.write_text(json.dumps({**header, "version": 1}) + '\n{"key": "a", "values": [1.0]}\n')
    assert open_checkpoint(path, bridge).rows == {"a": [1.0]}
    path.write_text(json.dumps(header) + '\n{"key": "a", "values": [1.0]}\n')
    assert open_checkpoint(path, bridge).rows == {}


# -- training state ----------------------------------------------------------------------------------------------------


def test_a_training_state_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = torch.randn(3, 4)
    state = {
        "step": 3,
        "rng": {"state": 2**127 + 1},
        "model": {"a": weights, "tied": weights},
        "heads": [{0: weights[1]}],
    }
    save_state(tmp_path / "s", state)
    found = load_state(tmp_path / "s")
    assert found["step"] == 3 and found["rng"] == state["rng"]
    assert torch.equal(found["model"]["tied"], weights) and torch.equal(found["heads"][0][0], weights[1])


def test_a_pickle_is_no_training_state(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save(Evil(), tmp_path / "s")
    with pytest.raises(ValueError, match="no training state"):
        load_state(tmp_path / "s")
    assert not (tmp_path / "ran").exists()
