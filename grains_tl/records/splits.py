"""Splitting records so that no record is on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np

from grains_tl._util.files import hash_of
from grains_tl.records.choices import MultipleChoice
from grains_tl.records.pairs import PreferencePair
from grains_tl.records.pictures import load_images

#: What is measured on: preference pairs, or questions with several answers.
Record = PreferencePair | MultipleChoice


def split_records(records: Iterable[Any], share: float = 0.5, *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Records for choosing and records to report on, at random; copies of a record stay together.

    Args:
        records: preference pairs or questions.
        share: of the records that go to the report.
        seed: of the split.

    Returns:
        ``(choose, report)``.

    Raises:
        ValueError: a share that leaves one side empty.

    Examples:
        >>> from grains_tl.records.pairs import PreferencePair
        >>> pairs = [PreferencePair(f"{i} + 1 =", f" {i + 1}", " 0") for i in range(10)]
        >>> [len(part) for part in split_records(pairs, 0.3)]
        [7, 3]
    """
    records = list(records)
    ids = list(dict.fromkeys(map(record_id, records)))
    n = round(share * len(ids))
    if not 0 < n < len(ids):
        raise ValueError(f"a share of {share} of {len(ids)} different records leaves one side of the split empty")
    held = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:n]}
    sides = [[r for r in records if (record_id(r) in held) == side] for side in (False, True)]
    return sides[0], sides[1]


def record_id(record: Record) -> str:
    """A hash of a record's text and images that does not see which response is the chosen one: to keep splits apart."""
    if isinstance(record, MultipleChoice):
        return hash_of([record.prompt, sorted(map(hash_of, record.choices))])
    pictures = [] if record.image is None else [sha256(p.tobytes()).hexdigest() for p in load_images(record.image)]
    tools = [repr(tool) for tool in record.tools or ()]
    return hash_of([record.prompt, sorted(map(hash_of, (record.chosen, record.rejected))), *pictures, *tools])
