"""What gr.check_model says of the usual families, and that docs/architectures.md says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import grains_tl as gr
from tests.conftest import TL_MAJOR
from tests.helpers import vision_families
from tests.helpers.architectures import CONFIGS, HOOKED, architecture

DOC = Path(__file__).parents[2] / "docs" / "architectures.md"
CLASSES = ["bridge"] if TL_MAJOR >= 4 else ["bridge", "hooked"]


def table_of(page: str) -> dict[tuple[str, str], str]:
    """(family, class) -> what the page says of it, "all" where everything passes."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    head = next(line for line in lines if line[0] == "family")
    rows = [line for line in lines if len(line) == len(head) and line[0] != "family" and set(line[0]) != {"-"}]
    return {(row[0], column): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


SAID = table_of(DOC.read_text(encoding="utf-8"))


def said(family: str, kind: str) -> set[str]:
    """The checks that the page says fail."""
    name = "HookedTransformer 3" if kind == "hooked" else f"bridge {TL_MAJOR}"
    cell = SAID[family, name]
    return set() if cell == "all" else {part.strip() for part in cell.removeprefix("not:").split(";")}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", CONFIGS)
def test_text_families(family: str, kind: str) -> None:
    if kind == "hooked" and family not in HOOKED:
        pytest.skip("TransformerLens cannot rebuild it from a model in memory")
    frame = gr.check_model(architecture(family, kind))
    assert set(frame.query("not ok")["check"]) == said(family, kind), frame.to_string()


@pytest.mark.parametrize("family", vision_families.FAMILIES, ids=lambda f: f.name)
def test_vision_families(family: vision_families.Family) -> None:
    frame = gr.check_model(vision_families.bridge(family))
    assert set(frame.query("not ok")["check"]) == said(f"{family.name} (vision)", "bridge"), frame.to_string()
