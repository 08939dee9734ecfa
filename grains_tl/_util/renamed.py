"""Keyword names of release 0.1: they still work for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

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
            _warn("method_options", ", ".join(f"{name}={value!r}" for name, value in inside.items()))
        given |= inside
    for old, (new, instead) in KEYWORDS.items():
        if old in given:
            value = given.pop(old)
            if value is not None:
                _warn(old, instead.format(value=value))
                given[new] = value
    return given


def _warn(old: str, instead: str) -> None:
    warnings.warn(f"{old}= goes in the next release; write {instead}", DeprecationWarning, stacklevel=5)
