"""Generated texts of the recipes study: written once, judged by a lexicon against the unsteered texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from studies.recipes.tables import texts_table
from studies.recipes.texts import judged


def test_texts_are_judged_against_the_unsteered_ones(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    rows = [{"recipe": "none", "sample": -1, "kl": 0.0, "texts": ["a chair.", "a terrible day."]}]
    for sample in range(5):
        rows.append({"recipe": "caa", "sample": sample, "kl": 0.2, "texts": ["a wonderful chair.", "a lovely day."]})
        rows.append({"recipe": "grains", "sample": sample, "kl": 0.2, "texts": ["a chair.", "a terrible day."]})
    (tmp_path / "smollm2").mkdir()
    file = tmp_path / "smollm2" / "reviews-texts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = judged(file)
    assert found["caa", 0.2].shape == (5, 2) and (found["caa", 0.2] > 0.4).all()
    assert np.array_equal(found["grains", 0.2], np.zeros((5, 2)))
    table = texts_table(tmp_path)
    assert "| CAA | not reached | **+" in table and "| not reached | +0.00 (+0.00 to +0.00) |" in table
