"""Preference records from wherever they are: Python lists, jsonl, csv, ``datasets.Dataset``, and our two bundled sets."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import resources
from itertools import takewhile
from pathlib import Path
from string import Formatter
from typing import Any

from grains_tl._util.checks import whole
from grains_tl.records.pairs import PreferencePair

FIELDS = ("prompt", "chosen", "rejected")

#: Where a record's image or images may stand; the second is TRL's name.
IMAGES = ("image", "images")


BUNDLED = ("sentiment", "misconceptions")

#: No record is longer; a file without line breaks is refused before it fills the memory.
MAX_LINE = 2**25


def neutral_texts(n: int | None = None) -> list[str]:
    """The first ``n`` (default all 30) of the short neutral texts that ship with the package.

    Args:
        n: how many texts, 1 to 30; default all.

    Returns:
        The texts.

    Raises:
        ValueError: ``n`` is not between 1 and 30.

    Examples:
        >>> len(neutral_texts()), neutral_texts(1)[0][:9]
        (30, 'The ferry')
    """
    lines = (resources.files("grains_tl") / "data_files" / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    if n is not None and not 1 <= whole("n", n) <= len(lines):
        raise ValueError(f"{n} neutral texts; there are 1 to {len(lines)}")
    return [json.loads(line)["text"] for line in lines[:n]]


def load_pairs(
    source: str | Path | Iterable[Any],
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
) -> list[PreferencePair]:
    r"""Read preference records.

    Args:
        source: a ``.jsonl`` / ``.json`` / ``.csv`` path, an iterable of mappings or ``PreferencePair``, or a
            ``datasets.Dataset`` or ``pandas.DataFrame``.
        columns: where the fields stand if they have other names: a column name, or a template with ``{column}`` in it,
            e.g. ``{"prompt": "Q: {Question}\nA:", "chosen": " {Best Answer}"}``. A semicolon list such as TruthfulQA's
            is read with ``{Incorrect Answers[0]}``: the first of its items. ``"image"`` too has a default, the column
            ``image`` or ``images``.
        limit: keep the first ``limit`` records.

    Returns:
        Records in the order of the source; other columns are kept in ``meta``.

    Raises:
        ValueError: no records, an empty field, ``chosen`` equal to ``rejected``, a broken line or row, text that is not
            UTF-8; the message names the row or line (from 1).
        KeyError: a missing column; the message lists the columns that are there.
        FileNotFoundError: the path does not exist.

    Warns:
        UserWarning: records that stand there twice (they are kept, and count twice); responses that are glued to the
            prompt's last word, because they have no leading space.

    Examples:
        >>> pairs = load_pairs([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> len(pairs), pairs[0].chosen
        (1, ' 4')
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"columns={columns!r}; a mapping such as {{'prompt': '<your column>'}} is needed")
    limit = None if limit is None else whole("limit", limit, 1)
    known = (*FIELDS, "image")
    unknown = set(columns or {}) - set(known)
    if unknown:
        raise ValueError(f"columns maps {sorted(unknown)}, but a record has only {known}")
    pairs: list[PreferencePair] = []
    for row_number, row in read_rows(source):
        if limit is not None and len(pairs) >= limit:
            break
        pairs.append(row if isinstance(row, PreferencePair) else _pair(row, columns or {}, row_number))
    if not pairs:
        raise ValueError(f"no records in {_name(source)}; a list or file with at least one preference pair is needed")
    _warn_of_repeats(pairs, source)
    _warn_of_glue(pairs, source)
    return pairs


def load_bundled(name: str, split: str | None = None) -> list[PreferencePair]:
    """One of the preference sets that ship with the package (written for it, MIT).

    Args:
        name: ``"sentiment"`` (mixed reviews: 88 build, 24 choose, 104 test) or ``"misconceptions"`` (72, 20, 60). The
            three splits come from different domains, so a gain on the test split is transfer.
        split: ``"build"``, ``"choose"``, ``"test"``, or ``None`` for all. ``meta`` holds split and domain, and for
            sentiment the word that carries the good and the bad detail.

    Returns:
        The records, in the order of the file.

    Raises:
        ValueError: an unknown set or split.

    Examples:
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
    """Rows of a file or any iterable, each with its number from 1 (its line in a text file)."""
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
            rows = _json("".join(_lines(path)), str(path))
            if not isinstance(rows, list):
                raise ValueError(f"{path} holds a {type(rows).__name__}; a list of records is needed")
            yield from enumerate(rows, start=1)
        else:
            raise ValueError(f"{path}: cannot read {suffix or 'a file without an ending'}; use .jsonl, .json or .csv")
        return
    if isinstance(source, Mapping):
        raise ValueError("one mapping was given; wrap the record in a list: load_pairs([record])")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas table: iterating it gives its header
        # a missing cell is NaN or NA there, and NaN would pass for the text "nan"
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    if not hasattr(source, "__iter__"):
        raise ValueError(f"records are a {type(source).__name__}; a list of mappings, a path or a table is needed")
    yield from enumerate(source, start=1)


def csv_cells(path: Path) -> Iterator[list[str]]:
    """The rows of a csv file, empty ones left out.

    Quotes must be closed and stand around whole cells: read leniently, one stray quote swallows the rows after it.

    Raises:
        ValueError: bad quoting, an overlong line or cell, text that is not UTF-8; the message names the line.
    """
    reader = csv.reader(_lines(path), strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: bad csv ({error}); put cells with commas, quotes or line breaks between "
                'double quotes, and write a quote inside them twice ("")'
            ) from None
        if cells:
            yield cells


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    rows = csv_cells(path)
    header = next(rows, [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the header names {twice} more than once; give every column its own name")
    for number, cells in enumerate(rows, start=1):
        if len(cells) > len(header):
            raise ValueError(
                f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; put cells with commas in quotes"
            )
        yield number, dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=True))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _json(line.rstrip("\r\n"), f"{path}, line {number}")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, ends included; none is read whole that is too long to be a record."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{path}, line {number}: longer than {MAX_LINE:,} characters; is every record on a line of its own?"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 after line {number} ({error.reason}); save the file as UTF-8 text"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {place})") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number with thousands of digits
        raise ValueError(f"{where}: JSON that cannot be read ({type(error).__name__}: {error})") from None


def _warn_of_repeats(pairs: list[PreferencePair], source: Any) -> None:
    first: dict[str, int] = {}
    again = []
    for number, pair in enumerate(pairs, start=1):
        if pair.image is None:
            key = repr((pair.prompt, pair.chosen, pair.rejected))
            if first.setdefault(key, number) != number:
                again.append(number)
    if again:
        warnings.warn(
            f"{_name(source)}: {len(again)} of {len(pairs)} records repeat earlier ones (the first: record {again[0]}); "
            "they count twice, and standard errors take them as independent",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_glue(pairs: list[PreferencePair], source: Any) -> None:
    """Only between unaccented letters and digits: other scripts may do without spaces."""
    glued = [
        (number, f"{prompt.split()[-1]}{response.split()[0]}")
        for number, pair in enumerate(pairs, start=1)
        for prompt, response in ((pair.prompt, pair.chosen), (pair.prompt, pair.rejected))
        if isinstance(prompt, str) and isinstance(response, str)
        if all(end.isascii() and end.isalnum() for end in (prompt[-1:], response[:1]))
    ]
    if glued:
        number, word = glued[0]
        warnings.warn(
            f"{_name(source)}: {len(glued)} of {2 * len(pairs)} responses follow the prompt without a space (record "
            f"{number} reads ...{word!r}); begin them with one",
            UserWarning,
            stacklevel=3,
        )


def _pair(row: Any, columns: Mapping[str, str], number: int) -> PreferencePair:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is a {type(row).__name__}; a mapping with {FIELDS} is needed")
    if "prompt" not in columns and "prompt" not in row:
        row = _with_prompt(row)
    values = {name: _field(row, name, columns.get(name, name), number) for name in FIELDS}
    used = set(columns.values()) | set(FIELDS)
    image, taken = _image(row, columns.get("image"), number)
    meta = {str(key): value for key, value in row.items() if key not in used and key not in taken}
    try:
        return PreferencePair(**values, image=image, meta=meta)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def _image(row: Mapping[str, Any], column: str | None, number: int) -> tuple[Any, Collection[str]]:
    """The record's image or images, if it has any, and the columns they came from."""
    if column is not None and column not in row:
        raise KeyError(f"row {number} has no column {column!r} for 'image'; it has {list(row)}")
    names = IMAGES if column is None else (column,)
    found = [row[name] for name in names if row.get(name) is not None]
    image = found[0] if found else None
    return None if isinstance(image, (list, str)) and not image else image, names


def _with_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """TRL's implicit prompts: where both responses are whole conversations, the messages they begin with in common."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    return {**row, "prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]} if n else row


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
            f'Map it: columns={{"{name}": "<your column>"}}, in a shell --column {name}="<your column>"'
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
