"""``grains-tl audit``: what a vector from anywhere does, as a report and an exit status."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grains_tl.cli.find import search_arguments
from grains_tl.cli.options import add_search_options

#: Exit status where the vector is not shown to steer; 2 is for input that was refused.
DOES_NOT_STEER = 1


def add_audit_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``audit`` alone."""
    parser.add_argument("vector", help="file of vectors: safetensors, GGUF control vector, torch.save, NumPy")
    parser.add_argument("--out", required=True, help="folder for report.html, table.csv and evidence.json")
    add_search_options(
        parser,
        "caa,margin_gradient,random_direction,orthogonal_direction",
        "recipes to compare with, controls included",
        "up to eight of those stored",
        (0.1, 0.2, 0.4),
    )


def run_audit(args: argparse.Namespace, pairs: Any, load: Callable[[], Any]) -> int:
    """Judge, print what came out, and write the report; 0 where the vector steers, else 1."""
    from grains_tl.finding.auditing import audit
    from grains_tl.vectors.files import load_vectors

    folder, given = Path(args.out), search_arguments(args)
    if not Path(args.vector).is_file():
        load_vectors(args.vector)  # says what is wrong before the model is loaded
    model = load()
    vectors = load_vectors(args.vector, model)
    folder.mkdir(parents=True, exist_ok=True)
    result = audit(model, vectors, pairs, **given)
    print(result.verdict)
    for path in _write(result, folder):
        print(path)
    return 0 if result.steers else DOES_NOT_STEER


def _write(result: Any, folder: Path) -> list[Path]:
    from grains_tl._util.files import write_atomically
    from grains_tl.plotting.html import page
    from grains_tl.plotting.style import figure_png

    picture = base64.b64encode(figure_png(result.plot())).decode()
    body = (
        f'<h1>Audit of a steering vector</h1>{result._repr_html_()}<img src="data:image/png;base64,{picture}" alt="">'
    )
    return [
        write_atomically(folder / "report.html", page("Audit of a steering vector", body).encode()),
        write_atomically(folder / "table.csv", result.table.to_csv(index=False).encode()),
        write_atomically(folder / "evidence.json", (json.dumps(result.evidence, indent=1) + "\n").encode()),
    ]
