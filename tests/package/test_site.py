"""The documentation as it is built: examples are code, signatures have one argument per line, no request leaves the site."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not all(util.find_spec(name) for name in ("mkdocs", "mkdocstrings", "mkdocs_jupyter")),
    reason="needs the docs extra",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of every page by its path; a warning while building is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.html")}


def test_examples_are_code(site: dict[str, str]) -> None:
    """``>>>`` outside a code block is read as three nested quotes."""
    nested = {page: len(re.findall(r"<blockquote>\s*<blockquote>", html)) for page, html in site.items()}
    assert not any(nested.values()), {page: n for page, n in nested.items() if n}
    reference = "".join(html for page, html in site.items() if page.startswith("reference/"))
    assert reference.count('<span class="gp">&gt;&gt;&gt; </span>') > 100


def test_signatures_have_one_argument_per_line(site: dict[str, str]) -> None:
    html = site["reference/attribution/index.html"]
    (signature,) = re.findall(r'id="grains_tl.attribution.attribute".*?<pre>(.*?)</pre>', html, re.S)
    lines = unescape(re.sub(r"<.*?>", "", signature)).splitlines()
    assert lines[0] == "attribute(" and lines[1] == "    model: HookedModel," and lines[-1].startswith(") -> ")


def test_internals_are_not_listed(site: dict[str, str]) -> None:
    reference = "".join(html for page, html in site.items() if page.startswith("reference/"))
    names = re.findall(r'<h\d id="(grains_tl[\w.]*)"', reference)
    assert len(names) > 150
    assert not [name for name in names if re.search(r"\._", name)]
    assert len(names) == len(set(names))


def test_pages_load_nothing_from_elsewhere(site: dict[str, str]) -> None:
    for page, html in site.items():
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)|<link rel="stylesheet" href="(https?:[^"]*)', html
        )
        assert not loaded, (page, loaded)


def test_every_notebook_opens_in_colab(site: dict[str, str]) -> None:
    owner = re.findall(r'^Homepage = "https://github.com/([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    names = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert len(names) >= 6 and len(owner) == 1
    for name in names:
        address = f"https://colab.research.google.com/github/{owner[0]}/blob/main/notebooks/{name}.ipynb"
        assert site[f"notebooks/{name}/index.html"].count(f'href="{address}"') == 1


def test_notebooks_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert max(sizes.values()) < 300_000, sizes
