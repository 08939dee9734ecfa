"""Warnings that point at the line of the user's own code."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into the package, however deep inside it the reason is found.

    Python prints that line beside the message, shows it once per line, and hides a DeprecationWarning that points at any
    code but the user's.

    Args:
        message: what is wrong and what to do.
        category: of the warning.
    """
    warnings.warn(message, category, stacklevel=1 + _level_of_the_caller())


def _level_of_the_caller() -> int:
    """The frame outside the package that called into it, counted from ``warn_caller``.

    Decorators put frames of torch between those of the package, so all of them are looked at.
    """
    package = __name__.partition(".")[0]
    frame, level, caller = sys._getframe(1).f_back, 1, 1
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            caller = level + 1
        frame, level = frame.f_back, level + 1
    return caller
