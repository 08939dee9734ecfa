"""All benchmarks, as one table and one JSON file: ``python -m benchmarks``.

Everything that is compared is timed in one process with a fixed number of threads, taking turns; figures are medians, in
CPU seconds (imports: seconds on the wall).
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import grains_tl as gr
from benchmarks import build_vectors, growth, memory, peers, steering
from benchmarks.common import load
from grains_tl._util.settings import RunSettings
from grains_tl.attribution.reference import REFERENCES
from grains_tl.vectors.manifest import package_versions

PARTS = ("peers", "build", "steering", "growth", "memory")

#: Where the last figures are kept.
LAST = Path(__file__).parent / "results" / "speed" / "last.json"


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, a Hugging Face name, or random:LAYERSxWIDTH[xVOCABULARY]"
    )
    parser.add_argument("--growth-model", default="random:4x256", help="operations grow alike in every model")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part (repeatable)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=int, default=50, help="building records")
    parser.add_argument("--steps", type=int, default=20, help="IG steps")
    parser.add_argument("--baseline", default="zero", choices=REFERENCES, help="where the IG path begins")
    parser.add_argument(
        "--max-tokens", type=int, default=RunSettings().max_tokens, help="token budget of a pass, building"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sweep-records", type=int, default=8)
    parser.add_argument("--json", default=str(LAST), help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = args.only or PARTS
    figures: dict[str, Any] = {
        "model": args.model,
        "threads": args.threads,
        "repeats": args.repeats,
        "python": platform.python_version(),
        "versions": package_versions(),
    }
    table: list[tuple[str, str]] = []
    if {"peers", "build", "steering"} & set(parts):
        model = load(args.model)
    if "peers" in parts and not args.model.startswith("random:"):
        plain = gr.models.load_hugging_face(args.model)[0]
        figures["peers"] = peers.run(model, plain, repeats=args.repeats)
        table += peers.rows(figures["peers"])
    if "build" in parts:
        options = {name: getattr(args, name) for name in ("records", "steps", "baseline", "max_tokens", "repeats")}
        figures["build"] = build_vectors.run(model, **options)
        table += build_vectors.rows(figures["build"])
    if "steering" in parts:
        figures["generation"] = steering.generation(model, new_tokens=args.new_tokens, repeats=args.repeats)
        figures["sweep"] = steering.sweep(model, records=args.sweep_records, repeats=args.repeats)
        table += steering.rows(figures["generation"], figures["sweep"])
    if "growth" in parts:
        figures["growth"] = growth.growth(load(args.growth_model))
        table += growth.rows(figures["growth"])
    if "memory" in parts:
        figures["memory"], figures["imports"] = memory.memory(args.model), memory.imports()
        table += memory.rows(figures["memory"], figures["imports"])
    print(f"{args.model}, {args.threads} threads, medians of {args.repeats}, CPU seconds\n")
    print(markdown(table))
    Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def markdown(table: list[tuple[str, str]]) -> str:
    """Two columns."""
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in table)])


if __name__ == "__main__":
    main()
