"""What studies share: models by name or path, the size of passes on a device, and tables that are made once and kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

import grains_tl as gr
from grains_tl._util.files import write_atomically

#: Tokens of one pass where a GPU runs them.
GPU_TOKENS = 16384

#: What figures call the recipes.
RECIPE_NAMES = {"grains": "GrAInS", "caa": "CAA", "margin_gradient": "margin gradient"}


def load(model: str, device: str = "cpu", **options: Any) -> tuple[str, Any]:
    """Label and model of ``name`` or ``label=path``; further options go to ``gr.load_model``."""
    label, _, path = model.partition("=")
    return label, gr.load_model(None if path else label, path=path or None, device=device, **options)


def settings(device: str, gpu_tokens: int = GPU_TOKENS) -> AbstractContextManager[Any]:
    """No bars, and larger passes on a GPU."""
    return gr.settings(progress=False, max_tokens=None if device == "cpu" else gpu_tokens)


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Keep a table as JSON records."""
    write_atomically(file, table.to_json(orient="records", indent=0, double_precision=5).encode())


class Pieces:
    """A study whose tables are files of their own; what is there is not run again.

    Attributes:
        out: the folder of the tables.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def piece(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table from its file, or made and kept."""
        file = self.out / f"{name}.json"
        if not file.exists():
            start = time.time()
            table = make()
            write_table(file, table)
            print(f"{name}: {len(table)} rows, {time.time() - start:.0f} s", flush=True)
        return pd.read_json(file)


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that such a study has: ``--out``, ``--device``, ``--small`` and ``--tables``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a few records, to try it out")
    parser.add_argument("--tables", action="store_true")
    return parser
