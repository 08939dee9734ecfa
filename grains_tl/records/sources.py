"""Rows of records from wherever they are: files, lists, columns, tables, data sets. All readers of the package use it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grains_tl._util.errors import RecordError

#: No record is longer; a file without line breaks is refused before it fills the memory.
MAX_LINE = 2**25


def read_rows(source: Any) -> Iterator[tuple[int, Any]]:
    """The rows of a source with their numbers from 1, one at a time: nothing is read before it is asked for.

    Args:
        source: a ``.jsonl`` / ``.ndjson`` / ``.json`` / ``.csv`` / ``.parquet`` path; an iterable of rows; a mapping from
            columns to lists; a ``pandas`` or ``polars`` table, an arrow table; a ``datasets.Dataset`` in any format, also
            streaming; a ``DatasetDict`` with one split.

    Yields:
        The row's number, and the row as the source has it (most often a mapping from columns to cells).

    Raises:
        ValueError: a source of another kind, or a broken line or row, which is named.
        FileNotFoundError: the path does not exist.
    """
    if isinstance(source, (str, Path)):
        yield from _file_rows(Path(source))
    elif isinstance(source, Mapping):
        yield from _mapping_rows(source)
    else:
        yield from enumerate(_table_rows(source), start=1)


def source_name(source: Any) -> str:
    """How messages call a source."""
    return str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl, .json, .csv or .parquet file, or a list of records")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(path)
    elif suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif suffix == ".json":
        yield from _json_rows(path)
    else:
        raise ValueError(
            f"{path}: cannot read {suffix or 'a file without an ending'}; use .jsonl, .json or .csv (or .parquet)"
        )


def _mapping_rows(source: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """A mapping from splits to data sets, or from columns to their cells."""
    values = list(source.values())
    if values and all(_is_rows(value) for value in values):
        if len(values) > 1:
            splits = list(source)
            raise ValueError(
                f"a mapping with the splits {splits} was given; name one of them: load_pairs(data[{splits[0]!r}])"
            )
        yield from read_rows(values[0])
        return
    columns = {name: _cells(value) for name, value in source.items()}
    if not columns or None in columns.values():
        raise ValueError("one mapping was given; wrap the record in a list: load_pairs([record])")
    lengths = {name: len(cells) for name, cells in columns.items() if cells is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns have different lengths: {lengths}; every column needs one cell for each record")
    for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        yield number, dict(zip(columns, cells, strict=True))


def _is_rows(value: Any) -> bool:
    """Whether a value is a data set by itself: a table, or a list of rows."""
    if hasattr(value, "columns") or hasattr(value, "column_names") or hasattr(value, "features"):
        return True
    # a list of mappings is a split, unless they are the messages of one record
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, Mapping) and not _is_message(row) for row in value)
    )


def _is_message(row: Mapping[str, Any]) -> bool:
    return ("role" in row or "from" in row) and not {"prompt", "chosen", "rejected"} & set(row)


def _cells(column: Any) -> list[Any] | None:
    """A column's cells; ``None`` for a text, or the messages of one conversation."""
    if hasattr(column, "tolist"):
        column = column.tolist()
    if isinstance(column, (str, bytes, Mapping)) or not isinstance(column, Iterable):
        return None
    cells = list(column)
    return None if cells and all(isinstance(cell, Mapping) and _is_message(cell) for cell in cells) else cells


def _table_rows(source: Any) -> Iterator[Any]:
    if hasattr(source, "to_dict") and hasattr(source, "columns") and hasattr(source, "notna"):  # pandas
        # a missing cell is NaN or NA there, and NaN would pass for the text "nan"
        return iter(source.astype(object).where(source.notna(), None).to_dict("records"))
    if hasattr(source, "iter_rows") and hasattr(source, "columns"):  # polars
        return iter(source.iter_rows(named=True))
    if hasattr(source, "to_batches") and hasattr(source, "schema"):  # an arrow table
        return (_without_fill(row) for batch in source.to_batches() for row in batch.to_pylist())
    if hasattr(source, "with_format") and hasattr(source, "features"):  # datasets, whatever format it was given
        return (_without_fill(row) for row in source.with_format(None))
    if not hasattr(source, "__iter__"):
        raise ValueError(f"records are a {type(source).__name__}; expected a list of mappings, a path or a table")
    return iter(source)


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading parquet files needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from map(_without_fill, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read as parquet ({reason}); use .jsonl, .json or .csv") from None


def _without_fill(value: Any) -> Any:
    """Arrow gives all mappings of a column the same keys and fills up with None: these keys were never there."""
    if isinstance(value, dict):
        return {key: _nested_without_fill(cell) for key, cell in value.items()}
    return value


def _nested_without_fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nested_without_fill(cell) for key, cell in value.items() if cell is not None}
    return [_nested_without_fill(cell) for cell in value] if isinstance(value, list) else value


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = "".join(_lines(path))
    if not text.lstrip().startswith("[") and "\n" in text.strip():  # some name a file of one object a line .json
        first = text.lstrip().partition("\n")[0]
        if _is_json(first):
            yield from _jsonl_rows(path)
            return
    rows = _json(text, str(path))
    if isinstance(rows, dict) and rows and all(isinstance(cells, list) for cells in rows.values()):
        yield from _mapping_rows(rows)
        return
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of records")
    yield from enumerate(rows, start=1)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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
            wrong = f"{len(cells)} cells under {len(header)} columns; put cells with commas in quotes"
            raise RecordError(f"{path}, row {number}: {wrong}", number)
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
