"""How runs are carried out, apart from what they compute: the token budget of a pass, and whether bars are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypedDict, TypeVar

from grains_tl._util.checks import whole

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class RunSettings:
    """What holds for every run inside ``with settings(...)``.

    Attributes:
        max_tokens: tokens, padding included, that one pass of the model may hold; less memory and more passes if lower.
        progress: show bars for whatever takes longer than a second.
    """

    max_tokens: int = 512
    progress: bool = True


class RunOptions(TypedDict, total=False):
    """The same as keyword arguments of a single call: ``**run: Unpack[RunOptions]``; see ``with_settings``."""

    max_tokens: int | None
    progress: bool | None


_DEFAULT = RunSettings()
_CURRENT: ContextVar[RunSettings] = ContextVar("grains_tl_run_settings", default=_DEFAULT)


def current() -> RunSettings:
    """The settings in force here."""
    return _CURRENT.get()


@contextmanager
def settings(*, max_tokens: int | None = None, progress: bool | None = None) -> Iterator[RunSettings]:
    """Set the token budget and the progress bars of every run inside the ``with`` block.

    Results do not depend on either, up to round-off in the last digits.

    Args:
        max_tokens: tokens, padding included, in one pass of the model (default 512); ``None`` leaves it as it is.
        progress: show progress bars (default yes); ``None`` leaves it as it is.

    Yields:
        The settings in force.

    Raises:
        ValueError: ``max_tokens`` is not a whole number of at least 1.

    Examples:
        >>> with settings(max_tokens=1024, progress=False) as now:
        ...     now.max_tokens
        1024
    """
    changed = replace(current())
    if max_tokens is not None:
        changed = replace(changed, max_tokens=whole("max_tokens", max_tokens, 1))
    if progress is not None:
        changed = replace(changed, progress=bool(progress))
    token = _CURRENT.set(changed)
    try:
        yield changed
    finally:
        _CURRENT.reset(token)


def with_settings(function: Function) -> Function:
    """Let a function's own ``max_tokens`` and ``progress`` arguments hold for everything it calls.

    A function that takes them as ``**run`` has no use for others: those are refused (TypeError).
    """
    names = signature(function).parameters
    known: set[str] | None = None
    if "run" in names and names["run"].kind is Parameter.VAR_KEYWORD:
        known = set(names) - {"run"} | set(RunOptions.__annotations__)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in [] if known is None else kwargs.keys() - known:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
        with settings(max_tokens=kwargs.get("max_tokens"), progress=kwargs.get("progress")):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
