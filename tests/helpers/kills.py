"""Kill a run at a random moment, run it again, compare: ``python -m tests.helpers.kills 30`` prints what came out."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grains_tl as gr
from grains_tl._util.files import write_atomically
from grains_tl.demo import text_report as report
from tests.conftest import tiny_model

NOUNS = "soup room film hotel food".split()
ROWS = [
    {"prompt": f"the {a} was good and the {b} was bad . overall it was", "chosen": " great", "rejected": " awful bad"}
    for a in NOUNS
    for b in NOUNS
    if a != b
]


def build(model: Any, folder: Path) -> None:
    """One attribution per record into a checkpoint, then the vectors into a file."""
    gr.build_vectors(
        model,
        gr.load_pairs(ROWS),
        top_k=2,
        method="integrated_gradients",
        n_steps=48,
        max_tokens=512,
        progress=False,
        checkpoint=folder / "build.partial.jsonl",
    ).save(folder / "vectors.safetensors")


def sweep(model: Any, folder: Path) -> None:
    """One row per result into a checkpoint, then the table into a file."""
    vectors = gr.load_vectors(folder / "vectors.safetensors", model)
    frame = gr.sweep(
        model,
        vectors,
        gr.load_pairs(ROWS),
        alphas=[a / 10 for a in range(-6, 7) if a],
        max_tokens=256,
        progress=False,
        checkpoint=folder / "sweep.partial.jsonl",
    )
    write_atomically(folder / "sweep.csv", frame.to_csv(index=False).encode())


def write(model: Any, folder: Path) -> None:
    """A report, several times over: a reader must find a whole one at any moment."""
    from tests.demo.test_report import fake_set

    results = {"settings": {"model": "tiny"}, "versions": {}, "seconds": 1.0, "sets": [fake_set()]}
    for _ in range(2):
        report.write_report(results, folder)


STAGES: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "build": (build, "vectors.safetensors"),
    "sweep": (sweep, "sweep.csv"),
    "report": (write, "report.html"),
}


def run(stage: str, model: Any, folder: Path, kill_after: float | None = None) -> tuple[int, float]:
    """The stage in a process of its own (a copy of this one), killed after some seconds; exit code and seconds."""

    def work() -> None:
        torch.set_num_threads(1)  # another thread's locks are not copied
        STAGES[stage][0](model, folder)
        os._exit(0)

    worker = multiprocessing.get_context("fork").Process(target=work)
    start = time.perf_counter()
    worker.start()
    worker.join(kill_after)
    if worker.is_alive() and kill_after is not None:
        os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    worker.join()
    return int(worker.exitcode or 0), time.perf_counter() - start


def same(stage: str, a: Path, b: Path) -> bool:
    """Whether two folders hold the same result; sums of a sweep may round differently in other batches."""
    name = STAGES[stage][1]
    if stage == "build":
        one, two = gr.load_vectors(a / name), gr.load_vectors(b / name)
        return torch.equal(one.raw, two.raw) and dict(one.info) == dict(two.info)
    if stage == "sweep":
        one, two = pd.read_csv(a / name), pd.read_csv(b / name)
        numbers = one.select_dtypes("number").columns
        return list(one) == list(two) and bool(np.allclose(one[numbers], two[numbers], atol=1e-4, equal_nan=True))
    pages = [re.sub(rb"circuits-vis-[0-9a-f-]+", b"", (folder / name).read_bytes()) for folder in (a, b)]
    return pages[0] == pages[1]  # but for the random names of the widgets


def finished(folder: Path, stage: str) -> int:
    """Whole lines in the stage's checkpoint."""
    path = folder / f"{stage}.partial.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def survive(n: int, folder: Path, *, seed: int = 0, stages: tuple[str, ...] = tuple(STAGES)) -> Counter[str]:
    """Kill ``n`` runs, stages in turn, and count what happened; every ``lost`` is a failure.

    Keys: ``killed``; ``late`` (done before the signal); ``partial`` (killed with some results in the file, not all);
    ``half-written`` (a result file that is there but not whole); ``lost`` (the rerun failed or gave something else).
    """
    torch.set_num_threads(1)
    model, rng, count = tiny_model(), random.Random(seed), Counter[str]()
    whole, seconds = folder / "whole", {}
    whole.mkdir(parents=True)
    for stage in STAGES:
        if stage in stages or stage == "build":
            code, seconds[stage] = run(stage, model, whole)
            assert code == 0, stage
    for i in range(n):
        stage = stages[i % len(stages)]
        name, now = STAGES[stage][1], folder / f"kill-{i}"
        now.mkdir()
        if stage == "sweep":
            shutil.copy(whole / "vectors.safetensors", now)
        code, _ = run(stage, model, now, kill_after=rng.uniform(0, seconds[stage]))
        count["killed" if code == -signal.SIGKILL else "late"] += 1
        count[f"killed in {stage}"] += code == -signal.SIGKILL
        count["partial"] += 1 < finished(now, stage) < finished(whole, stage)
        if (now / name).exists() and not same(stage, now, whole):
            count["half-written"] += 1
        code, _ = run(stage, model, now)
        count["lost"] += code != 0 or not same(stage, now, whole)
        shutil.rmtree(now)
    return count


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(
            json.dumps(
                survive(int(sys.argv[1]), Path(scratch) / "kills", seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
            )
        )
