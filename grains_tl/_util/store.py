"""Append-only jsonl files of finished results: what a killed run had finished is there for the next one.

Every line is a row with its checksum. A run killed while writing leaves a torn last line: it is skipped when the file is
read, and closed off before the next row is written. Damaged rows are skipped too, so that their results are computed again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_tl._util.files import cannot_write

#: What a line of such a file has in it even when part of it is damaged.
MARKS = ('"key"', '"crc"', '"scores"', '"values"')


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file, the torn one at its end among them; one empty line if there is no file."""
    file = Path(path)
    return (file.read_text(encoding="utf-8", errors="replace") if file.exists() else "").split("\n")


def rows_of(lines: Iterable[str], *, needs_crc: bool = True) -> list[dict[str, Any]]:
    """The sound rows that have a ``key``."""
    rows = (unsealed(line, needs_crc=needs_crc) for line in lines)
    return [row for row in rows if row is not None and isinstance(row.get("key"), str)]


def require_own(path: str | Path, lines: Sequence[str], kind: str) -> None:
    """Refuse a file of something else, before anything is written into it.

    Args:
        path: the file.
        lines: what it holds.
        kind: what the rows are, for the message.

    Raises:
        ValueError: the file has lines, and none of them can be such a row.
    """
    if any(line.strip() for line in lines) and not any(mark in line for line in lines for mark in MARKS):
        raise ValueError(f"{path} is not a checkpoint of {kind}: it holds something else; give another path")


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows at the end of a file; they are on disk afterwards. Without rows: see whether the file can be written.

    Raises:
        OSError: no space, no permission, ...: naming the file, whose rows so far are safe.
    """
    target, text = Path(path), "".join(map(sealed_line, rows))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_torn(target):
            text = "\n" + text
        with target.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        safe = "the results before are safe there, and the same call goes on from them"
        raise cannot_write(error, target, safe) from error


def sealed_line(row: Mapping[str, Any]) -> str:
    """A row of a jsonl file with its checksum, line end included.

    Examples:
        >>> unsealed(sealed_line({"key": "a", "values": [1.0]}))
        {'key': 'a', 'values': [1.0]}
    """
    return json.dumps({**row, "crc": _crc(row)}) + "\n"


def unsealed(line: str, *, needs_crc: bool = True) -> dict[str, Any] | None:
    """The row of one line; ``None`` if it is torn or damaged. Rows of older files have no checksum.

    Examples:
        >>> unsealed(sealed_line({"values": [1.5]}).replace("1.5", "1.7")) is None
        True
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    crc = row.pop("crc", None)
    sound = not needs_crc if crc is None else crc == _crc(row)
    return row if sound else None


def _crc(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
