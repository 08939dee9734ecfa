"""Build hook of mkdocs: the notebooks as pages of the site; they stay in their folder beside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
#: The repository's address; pyproject.toml is the one place that names its owner.
REPOSITORY = re.findall(
    r'^Homepage = "https://github.com/([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M
)[0]


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, *, config: Any) -> Files:
    """Add the notebooks to the pages."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        name = f"notebooks/{path.name}"
        files.append(File(name, str(FOLDER.parent), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """A button above every notebook that opens it in Colab; a link and no picture, so that the site loads nothing."""
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{source}"
    return f'<p><a class="md-button" href="{address}">Open in Colab</a></p>\n{html}'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to ``../notebooks/``, right in the repository, to where the site has the notebooks."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/", r"](\1notebooks/", markdown)
