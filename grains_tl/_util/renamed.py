"""Keyword names of release 0.1: they still work for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grains_tl._util.warn import warn_caller

#: Old keyword -> (new keyword, what to write instead).
KEYWORDS = {
    "masker": ("mask", "mask={value!r}"),
    "image_masker": ("image_mask", "mask=Mask(image={value!r})"),
    "baseline": ("reference", "reference={value!r}"),
}


def current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments under today's names; ``method_options`` of release 0.1 is opened up."""
    given = dict(fields)
    if "method_options" in given:
        inside = dict(given.pop("method_options") or {})
        if inside:
            warn_renamed("method_options", ", ".join(f"{name}={value!r}" for name, value in inside.items()))
        given |= inside
    for old, (new, instead) in KEYWORDS.items():
        if old in given:
            value = given.pop(old)
            if value is not None:
                warn_renamed(old, instead.format(value=value))
                given[new] = value
    return given


def old_keywords(function: str, given: Mapping[str, Any], instead: Mapping[str, str]) -> dict[str, Any]:
    """Keywords that a function no longer has and still takes for one release, each with its warning.

    Args:
        function: its name, for the error.
        given: what it received besides its own parameters.
        instead: old keyword -> what to write instead; ``{value!r}`` stands for the value given.

    Returns:
        The keywords whose value is not ``None``.

    Raises:
        TypeError: a keyword that the function never had.

    Examples:
        >>> old_keywords("build", {"n_jobs": None}, {"n_jobs": "processes=Processes(world={value!r})"})
        {}
    """
    if unknown := sorted(set(given) - set(instead)):
        raise TypeError(f"{function}() got unexpected keyword arguments: {', '.join(unknown)}")
    used = {name: value for name, value in given.items() if value is not None}
    for name, value in used.items():
        warn_renamed(name, instead[name].format(value=value))
    return used


def warn_renamed(old: str, instead: str) -> None:
    """Say what to write in place of an old keyword, at the line of the caller's own code."""
    warn_caller(f"{old}= goes in the next release; write {instead}", DeprecationWarning)
