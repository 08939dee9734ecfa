"""Tables and sentences from the raw results of ``studies.control``."""

from __future__ import annotations

from pathlib import Path


def report(out: Path) -> None:
    """Placeholder until the tables are known."""
    print(out)
