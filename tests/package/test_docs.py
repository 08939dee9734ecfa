"""The documentation: every Python block runs as pasted, every link and every page of the navigation exists."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import grains_tl as gr
from tests.conftest import TL_MAJOR

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.real
@pytest.mark.skipif(TL_MAJOR < 4, reason="two minutes; once is enough, and the README runs on both majors")
@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.parent != ROOT], ids=name_of)
def test_python_blocks_run(
    page: Path, smollm2: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of one page are one program; the README's runs in test_shows, on both classes."""
    load = gr.load_model
    monkeypatch.setattr(gr, "load_model", lambda name: smollm2.bridge if name == "smollm2" else load(name))
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, name_of(page), "exec"), space)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_python_blocks_use_names_that_exist(page: Path) -> None:
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        compile(block, name_of(page), "exec")
        for name in re.findall(r"\bgr\.([A-Za-z_]\w*)", block):
            assert hasattr(gr, name), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", [*sorted((DOCS / "how-to").glob("*.md")), DOCS / "vision.md"], ids=name_of)
def test_how_to_pages_show_what_comes_out(page: Path) -> None:
    """A picture, and what the blocks print (``python docs/_outputs.py PAGE`` writes both)."""
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^!\[.+\]\(", text, re.M), "no picture"
    assert ('```text title="Output"\n' in text) == ("print(" in text)
    assert '```text title="Output"\n```' not in text, "run docs/_outputs.py"


TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "grains_tl").rglob("*.py"))]
PLACE = re.compile(r"\b(?:tests|benchmarks|studies|grains_tl|notebooks|docs)/[\w/]+\.(?:py|md|ipynb|csv|jsonl?)\b")


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_files_that_are_named_exist(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    missing = [place for place in PLACE.findall(content) if not (ROOT / place).exists()]
    modules = re.findall(r"python -m ((?:grains_tl|studies|benchmarks|tests)[\w.]*)", content)
    missing += [name for name in modules if util.find_spec(name) is None]
    assert not missing, missing


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [p for value in (entry.values() if isinstance(entry, dict) else entry) for p in pages(value)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    notebooks = [f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(nav) == sorted(notebooks + [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")])


NAMESPACES = [name for name in gr.__all__ if isinstance(getattr(gr, name), ModuleType)]
NAMESPACES = [
    *NAMESPACES,
    "vectors",
    "records",
    "tokens",
    "inference",
    "models",
    "finding",
    "exploring",
    "faithfulness",
]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_reference_shows_the_public_names_and_no_others(namespace: str) -> None:
    """Each namespace has a page with one ``::: grains_tl.NAMESPACE.NAME`` per function and class."""
    module = getattr(gr, namespace)
    if namespace == "export":
        names = [n for n, f in vars(module).items() if n.startswith(("export_", "vllm_")) and callable(f)]
    else:
        names = [n for n in module.__all__ if callable(getattr(module, n))]
    page = (DOCS / "reference" / f"{namespace}.md").read_text(encoding="utf-8")
    assert sorted(re.findall(rf"^::: grains_tl\.{namespace}\.(\w+)$", page, re.M)) == sorted(names)


def test_reference_begins_with_the_top_level_names() -> None:
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    missing = [name for name in gr.__all__ if f"`gr.{name}`" not in index]
    assert not missing, missing
