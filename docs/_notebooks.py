"""Build hook of mkdocs: the notebooks as pages of the site; they stay in their folder beside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parents[1] / "notebooks"


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, *, config: Any) -> Files:
    """Add the notebooks to the pages."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        name = f"notebooks/{path.name}"
        files.append(File(name, str(FOLDER.parent), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to ``../notebooks/``, right in the repository, to where the site has the notebooks."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/", r"](\1notebooks/", markdown)
