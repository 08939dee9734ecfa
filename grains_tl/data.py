"""Preference records from wherever they are: Python lists, jsonl, csv, ``datasets.Dataset``, and our two bundled sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any

from grains_tl.types import PreferencePair

FIELDS = ("prompt", "chosen", "rejected")
BUNDLED = ("sentiment", "misconceptions")


def load_pairs(
    source: str | Path | Iterable[Any],
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
) -> list[PreferencePair]:
    """Read preference records.

    Args:
        source: a ``.jsonl`` / ``.json`` / ``.csv`` path, an iterable of mappings or ``PreferencePair``, or a
            ``datasets.Dataset``.
        columns: where the fields stand if they have other names: a column name, or a template with ``{column}`` in it,
            e.g. ``{"prompt": "Q: {Question}\\nA:", "chosen": " {Best Answer}"}``. A semicolon list such as TruthfulQA's
            is read with ``{Incorrect Answers[0]}``: the first of its items.
        limit: keep the first ``limit`` records.

    Returns:
        Records in the order of the source; other columns are kept in ``meta``.

    Raises:
        ValueError: no records, an empty field, ``chosen`` equal to ``rejected``; the message names the row (from 1).
        KeyError: a missing column; the message lists the columns that are there.
        FileNotFoundError: the path does not exist.

    Example:
        >>> pairs = load_pairs([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> len(pairs), pairs[0].chosen
        (1, ' 4')
    """
    unknown = set(columns or {}) - set(FIELDS)
    if unknown:
        raise ValueError(f"columns maps {sorted(unknown)}, but a record has only {FIELDS}")
    pairs: list[PreferencePair] = []
    for row_number, row in read_rows(source):
        if limit is not None and len(pairs) >= limit:
            break
        pairs.append(row if isinstance(row, PreferencePair) else _pair(row, columns or {}, row_number))
    if not pairs:
        raise ValueError(f"no records in {_name(source)}; a list or file with at least one preference pair is needed")
    return pairs


def load_bundled(name: str, split: str | None = None) -> list[PreferencePair]:
    """One of the preference sets that ship with the package (written for it, MIT).

    Args:
        name: ``"sentiment"`` (mixed reviews: 88 build, 24 choose, 104 test) or ``"misconceptions"`` (72, 20, 60). The
            three splits come from different domains, so a gain on the test split is transfer.
        split: ``"build"``, ``"choose"``, ``"test"``, or ``None`` for all. ``meta`` holds split and domain, and for
            sentiment the word that carries the good and the bad detail.

    Raises:
        ValueError: an unknown set or split.

    Example:
        >>> len(load_bundled("sentiment", "build"))
        88
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled set {name!r}; there are {BUNDLED}")
    if split not in (None, "build", "choose", "test"):
        raise ValueError(f"no split {split!r}; there are build, choose and test")
    with resources.as_file(resources.files("grains_tl") / "data_files" / f"{name}.jsonl") as path:
        pairs = load_pairs(path)
    return [p for p in pairs if split is None or p.meta["split"] == split]


def read_rows(source: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give a .jsonl, .json or .csv file, or a list of records")
        suffix = path.suffix.lower()
        if suffix == ".csv":
            yield from _csv_rows(path)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _jsonl_rows(path)
        elif suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError(f"{path} holds a {type(rows).__name__}; a list of records is needed")
            yield from enumerate(rows, start=1)
        else:
            raise ValueError(f"{path}: cannot read {suffix or 'a file without an ending'}; use .jsonl, .json or .csv")
        return
    if isinstance(source, Mapping):
        raise ValueError("one mapping was given; wrap the record in a list: load_pairs([record])")
    yield from enumerate(source, start=1)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from enumerate(csv.DictReader(file), start=1)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None


def _pair(row: Any, columns: Mapping[str, str], number: int) -> PreferencePair:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is a {type(row).__name__}; a mapping with {FIELDS} is needed")
    values = {name: _field(row, name, columns.get(name, name), number) for name in FIELDS}
    used = set(columns.values()) | set(FIELDS)
    meta = {str(key): value for key, value in row.items() if key not in used and key != "image"}
    try:
        return PreferencePair(**values, image=row.get("image"), meta=meta)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def _field(row: Mapping[str, Any], name: str, column: str, number: int) -> Any:
    try:
        if "{" in column:
            empty = [used for used in _columns_of(column) if row[used] is None]
            if empty:
                raise ValueError(f"the cells {empty} are missing")
            lists = {k: _Items(v) if isinstance(v, str) else v for k, v in row.items()}
            return column.format_map(lists)
        value = row[column]
    except ValueError as error:
        raise ValueError(f"row {number}, {name}: {error}") from None
    except KeyError as error:
        raise KeyError(
            f"row {number} has no column {error!s} for {name!r}; it has {list(row)}. "
            f'Map it: columns={{"{name}": "<your column>"}}'
        ) from None
    if value is None:
        raise ValueError(f"row {number}: {name} is missing (the cell {column!r} is empty)")
    return value


def _columns_of(template: str) -> list[str]:
    """Names of the columns a template uses."""
    fields = [field for _, field, _, _ in Formatter().parse(template) if field]
    return [field.partition("[")[0] for field in fields]


class _Items(str):
    """A cell; ``{cell}`` is its text and ``{cell[0]}`` the first item of its semicolon list."""

    def __getitem__(self, index: Any) -> str:
        items = [item.strip() for item in str.split(self, ";") if item.strip()]
        if int(index) >= len(items):
            raise ValueError(f"item [{index}] is wanted of a cell with {len(items)} items: {str(self)!r}")
        return items[int(index)]


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
