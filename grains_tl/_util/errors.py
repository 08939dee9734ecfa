"""The kinds of errors a caller may want to tell apart; all of them are ``ValueError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

#: What a model's own code raises for arguments that it does not take; see ``require_from_outside``.
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)

#: Packages that raise errors on behalf of whoever called them.
_GO_BETWEENS = {"torch", "einops", "jaxtyping", "beartype", "contextlib", "functools"}


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


def require_from_outside(error: BaseException) -> None:
    """Raise an error again unless a model's own code made it.

    A fast path is tried on architectures that may not take its masks or positions; whatever they raise then means "not
    here". The same kinds of error out of this package's own lines are mistakes, and out of memory is out of memory.

    Args:
        error: one of ``MODEL_ERRORS``, just caught.
    """
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return  # a model that takes no mask or positions; Python raises this in the line of the caller
    names = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    blamed = next((name for name in reversed(names) if name not in _GO_BETWEENS), "")
    if blamed == __name__.partition(".")[0] or "OutOfMemory" in type(error).__name__:
        raise error
