"""How the cost of a build grows with records, steps and prompt length: a fitted power, and a fitted straight line."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import grains_tl as gr
from benchmarks.common import off_the_line, slope
from grains_tl.models.operations import count_operations


def growth(model: Any, *, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, dict[str, float]]:
    """Exponents in forward token-layers and in seconds, and how far the token-layers lie from a straight line.

    Leave-one-out runs a prompt once per token, so it is quadratic in the length; integrated gradients are linear.
    """
    records = gr.load_bundled("sentiment", "build")
    base = records[:4]
    # fixed nodes: adaptive ones stop where the gap is small, whatever the budget
    ig: dict[str, Any] = {"method": "integrated_gradients", "n_steps": 4, "nodes": "gauss_legendre"}

    def longer(times: int) -> list[gr.PreferencePair]:
        return [replace(p, prompt=" ".join([str(p.prompt)] * times)) for p in base]

    tasks: dict[str, Any] = {
        "records": lambda n: (records[: 4 * n], ig),  # distinct ones
        "steps": lambda n: (base, {**ig, "n_steps": 4 * n}),
        "prompt length": lambda n: (longer(n), ig),
        "prompt length, leave-one-out": lambda n: (longer(n)[:1], {}),
    }
    found = {}
    for name, task in tasks.items():
        work, seconds = [], []
        for size in sizes:
            pairs, options = task(size)
            best = 1e9
            for _ in range(2):
                with count_operations(model) as counts:
                    started = time.process_time()
                    gr.build_vectors(model, pairs, top_k=1, progress=False, **options)
                    best = min(best, time.process_time() - started)
            work.append(counts.forward)
            seconds.append(best)
        found[name] = {
            "operations": slope(sizes, work),
            "seconds": slope(sizes, seconds),
            "off_the_line": off_the_line(sizes, work),
        }
    return found


def rows(found: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Lines of the table."""
    return [
        (
            f"growth of a build with {name}",
            f"token-layers ~ size^{f['operations']:.2f}, seconds ~ size^{f['seconds']:.2f}; "
            f"token-layers {f['off_the_line']:.0%} off a straight line",
        )
        for name, f in found.items()
    ]
