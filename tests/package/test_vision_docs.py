"""The example in docs/vision.md: at most 15 lines, runs as pasted, draws, and steers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "vision.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names the example leaves behind, and where it wrote its pictures."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    folder = tmp_path_factory.mktemp("vision")
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "docs/vision.md", "exec"), space)
    return {**space, "folder": folder}


def test_it_draws_both_pictures(example: dict[str, Any]) -> None:
    for name in ("patches.png", "captions.png"):
        width, height = Image.open(example["folder"] / name).size
        assert width > 500 and height > 200


def test_it_attributes_words_and_patches(example: dict[str, Any]) -> None:
    a = example["a"]
    assert a.is_image.sum() == 16 and (a.scores[a.is_image].abs() > 0).any() and (a.scores[~a.is_image].abs() > 0).any()


def test_it_steers(example: dict[str, Any]) -> None:
    assert len(example["before"]) == len(example["after"]) == 8
    assert example["before"] != example["after"]
