"""All benchmarks, as one table and one JSON file: ``python -m benchmarks``.

Everything that is compared is timed in one process with a fixed number of threads, taking turns; figures are medians, in CPU
seconds. Each part replaces its own figures in the file and leaves the others; ``python -m benchmarks.table`` writes the
table of ``docs/speed.md`` from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import build_vectors, growth, memory, peers, probes, starting, steering
from benchmarks.common import load, load_plain
from benchmarks.rows import Row, as_json, load_average
from benchmarks.table import LAST, markdown
from grains_tl._util.settings import RunSettings
from grains_tl.attribution.reference import REFERENCES
from grains_tl.vectors.manifest import package_versions

#: What a part gives: rows of the table, and further lines.
Found = tuple[list[Row], list[tuple[str, str]]]

#: Parts whose peers ask for packages that do not go with ours.
WITH_PEERS = ("caa", "generation")
#: Parts that take many minutes and are run only if named.
LONG = ("build", "steering")


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Found]]:
    """Each part by name; models are loaded when the first part asks for them."""
    loaded: dict[str, Any] = {}

    def model() -> Any:
        if "model" not in loaded:
            loaded["model"] = load(args.model)
        return loaded["model"]

    def plain() -> Any:
        if "plain" not in loaded:
            loaded["plain"] = load_plain(args.model)
        return loaded["plain"]

    def build() -> Found:
        options = {name: getattr(args, name) for name in ("records", "steps", "baseline", "max_tokens", "repeats")}
        return [], build_vectors.rows(build_vectors.run(model(), **options))

    def steered() -> Found:
        generated = steering.generation(model(), new_tokens=args.new_tokens, repeats=args.repeats)
        return [], steering.rows(generated, steering.sweep(model(), records=1, repeats=args.repeats))

    repeats = {"repeats": args.repeats}
    return {
        "caa": lambda: (peers.caa(model(), plain(), records=8, **repeats), []),
        "generation": lambda: (peers.generation(model(), plain(), new_tokens=args.new_tokens, **repeats), []),
        "integrated_gradients": lambda: (
            peers.integrated_gradients(model(), plain(), records=8, steps=10, **repeats),
            [],
        ),
        "leave_one_out": lambda: (peers.leave_one_out(model(), plain(), records=3, **repeats), []),
        "sweep": lambda: (peers.sweep(model(), plain(), records=args.sweep_records, **repeats), []),
        "probes": lambda: (probes.run(model(), shapes=((24, 30), (48, 30)), **repeats), []),
        "probes_200": lambda: (probes.run(model(), shapes=((200, 3),), **repeats), []),
        "tokenizing": lambda: (starting.tokenizing(model(), args.repeats), []),
        "starting": lambda: ([*starting.imports(args.repeats), *starting.loading(args.repeats)], []),
        "memory": lambda: (memory.rows(memory.memory(args.model)), []),
        "growth": lambda: ([], growth.rows(growth.growth(load(args.growth_model)))),
        "build": build,
        "steering": steered,
    }


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, a Hugging Face name, or random:LAYERSxWIDTH[xVOCABULARY]")
    add("--growth-model", default="random:4x256", help="operations grow alike in every model")
    add("--only", action="append", help="only this part (repeatable); build and steering run only if named")
    add("--peers", metavar="PYTHON", help="Python of an environment that also has repeng and steering-vectors")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--records", type=int, default=50, help="building records")
    add("--steps", type=int, default=20, help="IG steps, building")
    add("--baseline", default="zero", choices=REFERENCES, help="where the IG path begins, building")
    add("--max-tokens", type=int, default=RunSettings().max_tokens, help="token budget of a pass, building")
    add("--new-tokens", type=int, default=24)
    add("--sweep-records", type=int, default=4)
    add("--json", type=Path, default=LAST, help="file for the figures")
    args = parser.parse_args()
    known = parts(args)
    wanted = args.only or [name for name in known if name not in LONG]
    wrong = [name for name in wanted if name not in known]
    if wrong:
        parser.error(f"--only {wrong[0]}: expected one of {', '.join(known)}")
    if args.peers and (reason := peers.missing(args.peers)):
        parser.error(reason)
    torch.set_num_threads(args.threads)
    for name in wanted:
        if args.peers and name in WITH_PEERS:
            figures = elsewhere(args, name)
        else:
            before = load_average()
            rows, lines = known[name]()
            figures = {
                "threads": args.threads,
                "repeats": args.repeats,
                "load": [before, load_average()],
                "rows": as_json(rows),
                "lines": lines,
            }
        keep(args.json, args.model, name, figures)
    found = json.loads(args.json.read_text(encoding="utf-8"))
    found["parts"] = {name: part for name, part in found["parts"].items() if name in wanted}
    print(f"{args.model}, medians of {args.repeats}, CPU seconds\n")
    print(markdown(found))


def elsewhere(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """A part's figures from the peers' Python."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [args.peers, "-m", "benchmarks", "--only", part, "--json", str(file), "--model", args.model]
        for name in ("threads", "repeats", "new_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{part} did not run in {args.peers}:\n{done.stderr[-2000:]}")
        return json.loads(file.read_text(encoding="utf-8"))["parts"][part]


def keep(file: Path, model: str, name: str, figures: dict[str, Any]) -> None:
    """Replace one part's figures; those of another model go."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found.get("model") != model:
        found = {"model": model, "parts": {}}
    order = [*found["parts"], name] if name not in found["parts"] else [*found["parts"]]
    found["parts"][name] = figures
    found["parts"] = {name: found["parts"][name] for name in order}
    found |= {"python": platform.python_version(), "versions": package_versions()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
