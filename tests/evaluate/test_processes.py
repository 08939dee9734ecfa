"""Shares of a build: one, two and three processes give the same vectors; an unfinished share is taken up again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grains_tl as gr
from grains_tl._util.processes import Processes, files, launched
from grains_tl.cli.main import main
from grains_tl.evaluate.parallel import shared_sweep
from grains_tl.vectors.differences import CHUNK, shared_differences
from tests.conftest import tiny_hf, tiny_tokenizer
from tests.helpers.attributing import attribute_records

ATOL = 1e-5  # float32 sums over the records in another order
OPTIONS = {"method": "leave_one_out", "n_steps": 1, "objective": "sum", "mask": "zero"}
SELECTIONS = [
    gr.attribution.Selection((3,), (1, 2)),
    gr.attribution.Selection((1,), (2,)),
    gr.attribution.Selection((), (3,)),
    gr.attribution.Selection((2, 4), ()),
]


@given(st.integers(1, 7), st.integers(0, 40))
def test_shares_are_a_partition(world: int, n: int) -> None:
    shares = [Processes(rank, world).share(n) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_launcher_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == Processes(0, 1)
    assert launched().gather_shares(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("chunk", [1, 3, CHUNK])
def test_mean_of_sums_is_the_mean(
    model: Any, pairs: list[gr.PreferencePair], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grains_tl.vectors.differences.CHUNK", chunk)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    whole = gr.vectors.collect_differences(model, tokenized, SELECTIONS, layers=[0, 2])
    summed = shared_differences(model, tokenized, SELECTIONS, mean_only=True, layers=[0, 2])
    assert len(summed.toward_chosen) == -(-4 // chunk)
    a, b = gr.vectors.reduce_vectors(whole), gr.vectors.reduce_vectors(summed)
    torch.testing.assert_close(a.raw, b.raw, atol=ATOL, rtol=0)
    torch.testing.assert_close(a.resid_norms, b.resid_norms, atol=ATOL, rtol=0)


def test_more_processes_than_records_are_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with pytest.raises(ValueError, match="4 records for 5 processes"):
        shared_differences(bridge, tokenized, SELECTIONS, processes=Processes(0, 5))


def test_a_dead_share_is_redone_and_only_that(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenized = tmp_path / "v.partial.jsonl", gr.tokens.tokenize_pairs(bridge, pairs)
    wanted = attribute_records(bridge, tokenized, OPTIONS)
    for rank in (0, 2):  # the second of three processes dies
        mine = [tokenized[i] for i in Processes(rank, 3).share(4)]
        attribute_records(bridge, mine, OPTIONS, checkpoint=path, processes=Processes(rank, 3))
    torn = Path(f"{path}.rank1")
    torn.write_text('{"key": "torn')
    assert files(path) == [Path(f"{path}.rank{rank}") for rank in range(3)]
    done: list[list[Any]] = []
    monkeypatch.setattr("grains_tl.attribution.store.attribute_all", _noting(done))
    again = attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    assert done == [[tokenized[1]]]
    for a, b in zip(wanted, again, strict=True):
        torch.testing.assert_close(a.scores, b.scores, equal_nan=True)
    assert torn.read_text() == '{"key": "torn'  # another process may be writing there


def _noting(done: list[list[Any]]) -> Any:
    from grains_tl.attribution.api import attribute_all

    def noting(model: Any, tokenized: list[Any], **options: Any) -> Any:
        done.append(list(tokenized))
        return attribute_all(model, tokenized, **options)

    return noting


# -- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and records on disk, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_hf().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = "soup room film hotel food".split()
    rows = [
        {
            "prompt": f"the {a} was good and the {b} was bad . overall it was",
            "chosen": " great",
            "rejected": " awful bad",
        }
        for a in words
        for b in words
        if a != b
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows[:7])))
    for reduce in ("mean", "svd"):
        assert main(build(folder, reduce, f"alone-{reduce}")) == 0
    assert main(sweep(folder, "alone")) == 0
    return folder


def common(folder: Path) -> list[str]:
    return ["--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl")]


def build(folder: Path, reduce: str, out: str) -> list[str]:
    return ["build", "--out", str(folder / f"{out}.safetensors"), "--reduce", reduce, "--top-k", "2", *common(folder)]


def sweep(folder: Path, out: str) -> list[str]:
    table = ["--out", str(folder / f"{out}.csv"), "--alphas=-0.2,0.2", "--neutral", "0", "--report-share", "0"]
    return ["sweep", "--vectors", str(folder / "alone-mean.safetensors"), *table, *common(folder)]


def launch(world: int, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]  # with 0, accelerate 1.1 waits for ever
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", "grains_tl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(world: int, arguments: list[str]) -> None:
    """The same without a launcher and without importing everything again: copies of this process, with its variables."""

    def work(rank: int, port: int) -> None:
        torch.set_num_threads(1)  # another thread's locks are not copied
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os._exit(main(arguments))

    port = free_port()
    workers = [get_context("fork").Process(target=work, args=(rank, port)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * world


@pytest.mark.parametrize(("start", "world", "reduce"), [(launch, 2, "svd"), (fork, 3, "svd"), (fork, 2, "mean")])
def test_processes_build_the_same_vectors(start: Any, world: int, reduce: str, folder: Path) -> None:
    start(world, build(folder, reduce, f"{world}"))
    alone, shared = (gr.load_vectors(folder / f"{name}.safetensors") for name in (f"alone-{reduce}", str(world)))
    torch.testing.assert_close(shared.raw, alone.raw, atol=ATOL, rtol=0)
    torch.testing.assert_close(shared.resid_norms, alone.resid_norms, atol=ATOL, rtol=0)
    assert shared.info == alone.info
    assert list(folder.glob("*.partial*")) == []


def test_processes_sweep_the_same_table(folder: Path) -> None:
    fork(3, sweep(folder, "three"))
    pd.testing.assert_frame_equal(pd.read_csv(folder / "three.csv"), pd.read_csv(folder / "alone.csv"), atol=ATOL)
    rows = [set((folder / f"{name}.csv.records.jsonl").read_text().splitlines()) for name in ("three", "alone")]
    assert len(rows[0]) == len(rows[1])
    assert list(folder.glob("*.rank*")) == []


def test_a_dead_share_of_a_sweep_is_taken_over(folder: Path, bridge: Any, tmp_path: Path) -> None:
    pairs, vectors = gr.load_pairs(folder / "pairs.jsonl"), gr.load_vectors(folder / "alone-mean.safetensors")
    path = tmp_path / "sweep.jsonl"
    wanted = gr.sweep(bridge, vectors, pairs, progress=False)
    gr.sweep(bridge, vectors, pairs, layers=[0], checkpoint=Processes(0, 2).own_file(path), progress=False)
    found = shared_sweep(bridge, vectors, pairs, checkpoint=path, progress=False)
    pd.testing.assert_frame_equal(found, wanted, atol=ATOL)
    assert found.attrs["from_checkpoint"] > 0
    assert found.attrs["token_layers"] < wanted.attrs["token_layers"]
    assert list(tmp_path.iterdir()) == [path]
