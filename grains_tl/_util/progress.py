"""Progress bars: in a terminal or notebook they move, in a log each leaves one line when it is done."""

from __future__ import annotations

import math
import sys
import time
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

from grains_tl._util.settings import current

#: Seconds before a bar shows itself: what is over sooner needs none.
DELAY = 1.0
_INSIDE: ContextVar[bool] = ContextVar("grains_tl_inside_a_bar", default=False)


class _Bar(tqdm):
    """A bar that silences the bars of whatever runs inside its ``with`` block."""

    def __enter__(self) -> Any:
        self._outer = _INSIDE.set(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _INSIDE.reset(self._outer)
        super().__exit__(*error)


class _LogBar(_Bar):
    """For output that is no terminal: nothing while it runs, one line at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "mininterval": math.inf, "delay": 1e-9})

    def close(self) -> None:
        if not self.disable:
            self.leave = time.time() - self.start_t >= DELAY
            # tqdm says nothing at the end of a bar that never moved, unless it believes that it did
            self.last_print_t = time.time() if self.leave else self.start_t
        super().close()


def progress_bar(*args: Any, **options: Any) -> Any:
    """``tqdm`` with the package's habits: shown after a second, under ``settings(progress=...)``, one bar at a time."""
    options["disable"] = not current().progress or _INSIDE.get() or options.get("disable", False)
    moves = sys.stderr.isatty() or any(cls.__module__ == "tqdm.notebook" for cls in tqdm.__mro__)
    return _Bar(*args, delay=DELAY, **options) if moves else _LogBar(*args, **options)
