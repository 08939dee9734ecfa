"""Run the Python blocks of pages and write what they print below them: ``python docs/_outputs.py docs/how-to/steer.md``.

A block followed by a fence titled "Output" gets its printed text there. Pictures that a block saves with
``savefig("name.png")`` go to ``docs/img``.
The blocks of a page are one program, as ``tests/package/test_docs.py`` runs them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

import grains_tl as gr

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r'^```python\n(?P<code>.*?)^```\n(?P<output>\n```text title="Output"\n.*?^```\n)?', re.S | re.M)


def rewrite(page: Path, models: dict[str, Any]) -> None:
    """Run a page's blocks in an empty folder and put their output into the page."""
    space: dict[str, Any] = {}
    load = gr.load_model

    def cached(name: str, **options: Any) -> Any:
        if options:
            return load(name, **options)
        if name not in models:
            models[name] = load(name)
        return models[name]

    def run(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], str(page), "exec"), space)
        code = f"```python\n{block['code']}```\n"
        if block["output"] is None:
            return code
        text = "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())
        return f'{code}\n```text title="Output"\n{text}\n```\n'

    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        gr.load_model = cached  # type: ignore[assignment]
        try:
            text = BLOCK.sub(run, page.read_text(encoding="utf-8"))
        finally:
            gr.load_model = load
            os.chdir(here)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, DOCS / "img" / picture.name)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    (DOCS / "img").mkdir(exist_ok=True)
    pd.set_option("display.width", 110, "display.max_columns", 20, "display.precision", 3)
    loaded: dict[str, Any] = {}
    with gr.settings(progress=False):
        for name in sys.argv[1:]:
            print(name, file=sys.stderr)
            rewrite(Path(name).resolve(), loaded)
