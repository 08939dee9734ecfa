"""Texts and conversations in the forms that data sets have them, brought to the one form of the package."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Who speaks in ShareGPT's turns (``from``), and the role that chat templates know.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SERIALISED = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def as_text(value: Any) -> Any:
    """A text or conversation as the package has it: ``str``, or a list of ``{"role", "content"}`` mappings.

    Read are lists and arrays of messages, one message alone, columns of messages (``{"role": [...], "content": [...]}``),
    ShareGPT's turns (``{"from": "human", "value": ...}``), and any of these as JSON or as Python prints them, as csv files
    have them. Anything else is returned as it is, for ``require_text`` to refuse.

    Args:
        value: a cell of a record.

    Raises:
        ValueError: turns or serialised messages that cannot be read.

    Examples:
        >>> as_text([{"from": "human", "value": "Hi"}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    value = plain(value)
    if isinstance(value, str):
        if not _SERIALISED.match(value):
            return value
        value = _parsed(value)
    if isinstance(value, list) and value and all(isinstance(m, str) and m.lstrip().startswith("{") for m in value):
        value = _parsed(f"[{', '.join(value)}]")  # as some data sets keep messages of different shapes
    if isinstance(value, Mapping):
        value = _rows_of(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(message, Mapping) for message in value):
        return [_message(message) for message in value]
    return value


def plain(value: Any) -> Any:
    """Arrays as lists and NumPy's scalars as Python's, at any depth; a column formatted as numpy has both."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _rows_of(value: Mapping[str, Any]) -> Any:
    """One message, or messages given column by column."""
    if set(value) & {"role", "from"}:
        lists = {key: column for key, column in value.items() if isinstance(column, list)}
        if not isinstance(value.get("role", value.get("from")), list):
            return [value]
        if len(lists) == len(value) and len({len(column) for column in lists.values()}) == 1:
            return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    return value


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and content under these names; cells that are ``None`` were not given (arrow fills up with them)."""
    given = {key: cell for key, cell in message.items() if cell is not None or key == "content"}
    if "role" in given or "from" not in given:
        return given
    speaker = given.pop("from")
    if speaker not in SHAREGPT_ROLES or "value" not in given:
        raise ValueError(
            f"the turn {dict(message)!r} cannot be read; 'from' is one of {sorted(SHAREGPT_ROLES)} and 'value' its text. "
            "Write other turns as messages with 'role' and 'content'"
        )
    return {"role": SHAREGPT_ROLES[speaker], "content": given.pop("value"), **given}


def _parsed(text: str) -> Sequence[Any]:
    """Messages that were written into one cell."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        short = text if len(text) <= 80 else text[:77] + "..."
        raise ValueError(
            f"the cell {short!r} looks like messages, but is neither JSON nor a Python list; write the conversations with "
            "json.dumps, or save the records as .jsonl or .parquet"
        ) from None
