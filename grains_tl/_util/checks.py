"""Numbers as users write them: Python's, NumPy's, torch's; refused before anything runs where they cannot be meant."""

from __future__ import annotations

import math
import operator
from typing import Any


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number as Python's ``int``, so that it can be written into a file later.

    Raises:
        ValueError: no whole number (1.5, "3", True), or below ``least``.

    Examples:
        >>> import numpy as np
        >>> whole("top_k", np.int64(3), 1)
        3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}; expected a whole number") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={number}; expected at least {least}")
    return number


def finite(name: str, value: Any) -> float:
    """A finite number as Python's ``float``; NumPy's and torch's scalars too.

    Raises:
        ValueError: no number, several numbers, NaN or inf.

    Examples:
        >>> finite("alpha", 1)
        1.0
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}={value!r}; expected one number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}; expected a finite number")
    return number


def listed(name: str, values: Any) -> list[Any]:
    """The items of a list, range, array, tensor or generator, as Python's own numbers where they are numbers.

    Raises:
        ValueError: one number, or a text.

    Examples:
        >>> listed("layers", range(2))
        [0, 1]
    """
    if hasattr(values, "tolist"):  # arrays, tensors, series
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name}={values!r}; expected a list: {name}=[{values}]")
    return list(values)


def layer_numbers(layers: Any) -> list[int]:
    """Layers as whole numbers; whether they exist is for the caller to say.

    Raises:
        ValueError: no list, or something in it that is no whole number.
    """
    return [whole("layer", layer) for layer in listed("layers", layers)]
