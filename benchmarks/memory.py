"""Peak resident memory of building and sweeping, each in a process of its own.

Reading a model's file needs more memory than running it, which would hide what runs need: the peak is reset (Linux) once the
model is there, and again after one forward pass, whose peak is what the others are compared with.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

#: Where Linux takes the order to reset a process's peak.
CLEAR = Path("/proc/self/clear_refs")

JOBS = ("model", "build", "build with gradients", "sweep")


def main() -> None:
    """Do one job and print the peak of one forward pass and of the job in MiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--records", type=int, default=4)
    args = parser.parse_args()

    import torch

    import grains_tl as gr
    from benchmarks.common import load
    from benchmarks.steering import random_vectors

    torch.set_num_threads(1)
    model = load(args.model)
    pairs = gr.load_bundled("sentiment", "build")[: args.records]
    reset()
    gr.score_pairs(model, gr.tokens.tokenize_pairs(model, pairs[:1]))
    forward = peak()
    reset()
    if args.job == "build":
        gr.build_vectors(model, pairs, top_k=3, progress=False)
    elif args.job == "build with gradients":
        gr.build_vectors(model, pairs, top_k=3, method="integrated_gradients", n_steps=4, progress=False)
    elif args.job == "sweep":
        gr.sweep(model, random_vectors(model), pairs, progress=False)
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    print(json.dumps({"peak": peak(), "forward": forward, "weights": weights / 2**20}))


def reset() -> None:
    """Give free memory back and let the peak begin at what is in use now (Linux; elsewhere it stays)."""
    if CLEAR.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        CLEAR.write_text("5", encoding="ascii")


def peak() -> float:
    """MiB since the last reset; Linux counts in KiB."""
    if CLEAR.exists():
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(model: str) -> dict[str, Any]:
    """Peak of each job."""
    found = {}
    for job in JOBS:
        command = [sys.executable, "-m", "benchmarks.memory", "--job", job, "--model", model]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[job] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(found: dict[str, Any], records: int = 4) -> list[Row]:
    """Each job's peak beside that of one forward pass."""
    aims = {"build": "+10%", "build with gradients": "+25%", "sweep": "+10%"}
    names = {"build": "build, leave-one-out", "build with gradients": "build, integrated gradients", "sweep": "sweep"}
    return [
        Row(
            f"peak memory, {name}, {records} records",
            found[job]["peak"],
            f"one forward pass (weights {found[job]['weights']:.0f} MiB)",
            found[job]["forward"],
            aims[job],
            "MiB",
        )
        for job, name in names.items()
    ]


if __name__ == "__main__":
    main()
