"""Peak resident memory of building and sweeping, and the time of an import, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

JOBS = ("model", "build", "build with gradients", "sweep")


def main() -> None:
    """Do one job and print this process's peak resident memory in MiB."""
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
    gr.score_pairs(
        model, gr.tokens.tokenize_pairs(model, pairs[:1])
    )  # what any forward pass needs belongs to the model
    before = peak()
    if args.job == "build":
        gr.build_vectors(model, pairs, top_k=3, progress=False)
    elif args.job == "build with gradients":
        gr.build_vectors(model, pairs, top_k=3, method="integrated_gradients", n_steps=4, progress=False)
    elif args.job == "sweep":
        gr.sweep(model, random_vectors(model), pairs, progress=False)
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    print(json.dumps({"peak": peak(), "before": before, "weights": weights / 2**20}))


def peak() -> float:
    """MiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(model: str) -> dict[str, Any]:
    """Peak of each job."""
    found = {}
    for job in JOBS:
        command = [sys.executable, "-m", "benchmarks.memory", "--job", job, "--model", model]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[job] = json.loads(done.stdout.splitlines()[-1])
    return found


def imports() -> dict[str, float]:
    """Seconds of an import in a fresh process, the faster of two."""
    found = {}
    for name in ("torch", "transformer_lens", "grains_tl", "grains_tl.cli"):
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            seconds.append(time.perf_counter() - started)
        found[name] = min(seconds)
    return found


def rows(found: dict[str, Any], imported: dict[str, float]) -> list[tuple[str, str]]:
    """Lines of the table."""
    alone = found["model"]["peak"]
    lines = [("peak memory, model and one forward pass", f"{alone:.0f} MiB (weights {found['model']['weights']:.0f})")]
    for job in JOBS[1:]:
        lines.append((f"peak memory, {job}", f"{found[job]['peak']:.0f} MiB ({found[job]['peak'] / alone - 1:+.0%})"))
    return lines + [(f"import {name}", f"{seconds:.1f} s") for name, seconds in imported.items()]


if __name__ == "__main__":
    main()
