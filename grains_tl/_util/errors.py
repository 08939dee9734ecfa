"""The kinds of errors a caller may want to tell apart; all of them are ``ValueError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RecordError(ValueError):
    """A record, row, question or prompt that cannot be used.

    Attributes:
        number: which one it is, counted from 1; ``None`` where a single one was given.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.number = number


class OptionError(ValueError):
    """An argument whose value cannot be used, whatever the records are."""


@contextmanager
def numbered(kind: str, number: int) -> Iterator[None]:
    """Put the number of a record in front of whatever is wrong with it.

    Args:
        kind: what the caller calls it: ``"record"``, ``"row"``, ``"prompt"``, ...
        number: its number, from 1.

    Raises:
        RecordError: in place of any ``ValueError`` inside the ``with`` block.

    Examples:
        >>> with numbered("record", 3):
        ...     raise ValueError("chosen is empty")
        Traceback (most recent call last):
        ...
        grains_tl._util.errors.RecordError: record 3: chosen is empty
    """
    try:
        yield
    except ValueError as error:
        raise RecordError(f"{kind} {number}: {error}", number) from None
