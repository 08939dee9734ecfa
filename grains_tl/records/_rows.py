"""Rows of a benchmark's file that say where they stand when something is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grains_tl.records._prompts import Question, question_item
from grains_tl.records.choices import MultipleChoice
from grains_tl.records.sources import csv_cells, read_rows, source_name

MMLU_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


@dataclass(frozen=True)
class Row:
    """Cells by column; every method raises a ValueError with the place, the cell and what was wanted."""

    where: str
    cells: Mapping[str, Any]

    def wrong(self, column: str, wanted: str) -> ValueError:
        if column not in self.cells:
            return ValueError(f"{self.where}: no column {column!r} ({wanted} is wanted); there are {list(self.cells)}")
        return ValueError(f"{self.where}, column {column!r}: {self.cells[column]!r}; {wanted} is wanted")

    def text(self, column: str) -> str:
        value = self.cells.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(column, "text")
        return value

    def texts(self, column: str, value: Any = None) -> list[str]:
        value = self.cells.get(column) if value is None else value
        if not hasattr(value, "__len__") or isinstance(value, (str, Mapping)):
            raise self.wrong(column, "a list of texts")
        if not all(isinstance(text, str) and text.strip() for text in value) or not len(value):
            raise self.wrong(column, "a list of texts, none empty,")
        return list(value)

    def number(self, column: str) -> float:
        try:
            value = float(self.cells[column])
        except (KeyError, TypeError, ValueError):
            raise self.wrong(column, "a number") from None
        if not math.isfinite(value):
            raise self.wrong(column, "a finite number")
        return value

    def nested(self, column: str, *keys: str) -> list[Any]:
        value = self.cells.get(column)
        if not isinstance(value, Mapping) or any(key not in value for key in keys):
            raise self.wrong(column, f"a mapping with {' and '.join(keys)}")
        parts = [list(value[key]) for key in keys]
        if len({len(part) for part in parts}) != 1:
            raise self.wrong(column, f"as many {' as '.join(keys)}")
        return parts

    def item(
        self,
        question: str,
        answers: list[str],
        labels: list[bool],
        style: str,
        used: Iterable[str],
        context: str = "",
        subject: str = "",
    ) -> MultipleChoice:
        meta = {str(key): value for key, value in self.cells.items() if key not in used}
        try:
            return question_item(Question(question, answers, labels, context, subject, meta), style)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


def source_rows(source: Any, *, mmlu: bool = False) -> Iterator[Row]:
    """Rows of a file or list, numbered from 1; with ``mmlu``, a csv may lack its header."""
    label = source_name(source)
    is_mmlu_csv = mmlu and isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".csv"
    for number, cells in _mmlu_csv(Path(source)) if is_mmlu_csv else read_rows(source):
        where = f"{label}, row {number}"
        if not isinstance(cells, Mapping):
            raise ValueError(f"{where} is a {type(cells).__name__}; expected a mapping from columns to cells")
        yield Row(where, cells)


def _mmlu_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the csv of one MMLU subject, or a list of rows")
    subject = path.stem
    for split in ("_dev", "_val", "_test"):
        subject = subject.removesuffix(split)
    lines = list(csv_cells(path))
    if lines and [cell.strip().lower() for cell in lines[0]] == list(MMLU_COLUMNS):
        lines = lines[1:]
    for number, line in enumerate(lines, start=1):
        if len(line) != len(MMLU_COLUMNS):
            raise ValueError(f"{path}, row {number}: {len(line)} cells; question, four choices and answer are wanted")
        yield number, {"subject": subject, **dict(zip(MMLU_COLUMNS, line, strict=True))}
