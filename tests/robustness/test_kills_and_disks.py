"""Runs that are killed, disks that are full, folders that are read-only: nothing finished is lost, nothing half is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.evaluate.store import open_checkpoint
from tests.helpers.kills import STAGES, survive

OPTIONS: dict[str, Any] = {"top_k": 1, "progress": False}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_runs_go_on_and_end_alike(tmp_path: Path) -> None:
    """One kill per stage; ``python -m tests.helpers.kills 30`` does more."""
    count = survive(3, tmp_path / "kills")
    assert count["lost"] == count["half-written"] == 0
    assert count["killed"] + count["late"] == 3 == len(STAGES)


class Full:
    """A file on a disk that holds no more than some further rows, counted over all files."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room, self.name = file, room, file.name

    def write(self, text: str) -> int:
        self.room[0] -= bool(text)
        if self.room[0] < 0:
            self.file.write(text[: len(text) // 2])  # what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(text)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()


def fill_up(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Appending fails after ``room`` writes."""
    plain, left = Path.open, [room]

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = plain(self, mode, *args, **kwargs)
        return Full(file, left) if "a" in mode else file

    monkeypatch.setattr(Path, "open", opening)


def test_build_on_a_full_disk(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = tmp_path / "build.jsonl", gr.build_vectors(bridge, pairs, **OPTIONS)
    with monkeypatch.context() as patch:
        fill_up(patch, 2)
        with pytest.raises(OSError, match=r"No space left .*cannot write; the results before are safe") as caught:
            gr.build_vectors(bridge, pairs, checkpoint=path, **OPTIONS)
    assert caught.value.filename == str(path)
    assert path.read_text().count("\n") == 2
    assert torch.equal(gr.build_vectors(bridge, pairs, checkpoint=path, **OPTIONS).raw, wanted.raw)


def test_sweep_on_a_full_disk(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, vectors = tmp_path / "sweep.jsonl", gr.build_vectors(bridge, pairs, **OPTIONS)
    options: dict[str, Any] = {"max_tokens": 32, "progress": False, "alphas": [-0.2, 0.2]}
    wanted = gr.sweep(bridge, vectors, pairs, **options)
    with monkeypatch.context() as patch:
        fill_up(patch, 3)
        with pytest.raises(OSError, match=r"No space left .*the same call goes on from them"):
            gr.sweep(bridge, vectors, pairs, checkpoint=path, **options)
    assert len(open_checkpoint(path, bridge).rows) > 0
    again = gr.sweep(bridge, vectors, pairs, checkpoint=path, **options)
    assert again.attrs["from_checkpoint"] > 0
    torch.testing.assert_close(torch.tensor(again["effect"]), torch.tensor(wanted["effect"]), atol=1e-5, rtol=0)


def test_files_on_a_full_disk_keep_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "r.html", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: cannot write; the existing file is unchanged"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where a folder should be stands for a read-only folder, which does not stop the administrator."""
    (tmp_path / "out").write_text("a file")
    vectors = gr.build_vectors(bridge, pairs, **OPTIONS)
    with pytest.raises(OSError, match="cannot write"):
        vectors.save(tmp_path / "out" / "v.safetensors")
    monkeypatch.setattr("grains_tl.attribution.store.attribute_all", lambda *args, **kwargs: pytest.fail("it ran"))
    monkeypatch.setattr("grains_tl.evaluate.measuring.run_settings", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(OSError, match="out"):
        gr.build_vectors(bridge, pairs, checkpoint=tmp_path / "out" / "c.jsonl", **OPTIONS)
    with pytest.raises(OSError, match="out"):
        gr.sweep(bridge, vectors, pairs, checkpoint=tmp_path / "out" / "c.jsonl", progress=False)
