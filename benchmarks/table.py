"""The table in ``docs/speed.md``, written from the figures of the last run: ``python -m benchmarks.table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

#: Where the figures of the last run of every part are kept.
LAST = Path(__file__).parent / "results" / "speed" / "last.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- figures: begin (python -m benchmarks.table) -->", "<!-- figures: end -->"


def rows_of(figures: dict[str, Any]) -> list[tuple[Row, dict[str, Any]]]:
    """Every row with the part that it belongs to."""
    return [(Row(**row), part) for part in figures["parts"].values() for row in part["rows"]]


def markdown(figures: dict[str, Any]) -> str:
    """All rows, the circumstances of each, and where its time goes."""
    lines = [
        "| work | grains_tl | peer | ratio | aim | threads, runs, load |",
        "|---|---|---|---|---|---|",
    ]
    rests: dict[str, str] = {}
    for row, part in rows_of(figures):
        ours, theirs = row.costs()
        peer = f"{row.peer}: {theirs}" + (f" ({row.agreement})" if row.agreement else "")
        lines.append(f"| {row.work} | {ours} | {peer} | **{row.ratio}** | {row.aim} | {circumstances(part)} |")
        if row.rest:
            rests[row.work] = row.rest
    lines += ["", "Where our time goes, by PyTorch's profiler or Python's:", "", "| work | shares |", "|---|---|"]
    lines += [f"| {work} | {rest} |" for work, rest in rests.items()]
    extra = [line for part in figures["parts"].values() for line in part["lines"]]
    if extra:
        lines += ["", "| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in extra)]
    return "\n".join(lines)


def circumstances(part: dict[str, Any]) -> str:
    """Threads, runs of which a figure is the median, and the machine's load before and after."""
    before, after = part["load"]
    return f"{part['threads']}, {part['repeats']}, {before} to {after}"


def page_with(text: str, table: str) -> str:
    """The page with this table between its marks."""
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main() -> None:
    """Put the last figures into the page."""
    figures = json.loads(LAST.read_text(encoding="utf-8"))
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), markdown(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
