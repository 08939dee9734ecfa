"""One row of a data set as a preference pair: which cells make which field, and where the prompt ends."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from itertools import takewhile
from string import Formatter
from typing import Any

from grains_tl._util.errors import RecordError, numbered
from grains_tl.records.messages import as_text, plain
from grains_tl.records.pairs import PreferencePair, repeats
from grains_tl.types import Text

FIELDS = ("prompt", "chosen", "rejected")

#: Where a record's image or images may stand; the second is TRL's name.
IMAGES = ("image", "images")

#: Other names that conversations before the answer go by.
PROMPTS = ("conversations", "conversation", "messages")

#: What the assistant's turn begins with in dialogues written as one text (hh-rlhf, and formats for instructions).
ASSISTANT_TURN = re.compile(r"(?:^|\n)[ \t]*(?:Assistant:|### Assistant:|### Response:)")


#: Columns with a conversation's system prompt.
SYSTEM = ("system", "system_prompt")

#: Columns that say how a conversation is to be rendered; leaving them out would change the input silently.
FOR_TEMPLATES = (*SYSTEM, "chat_template_kwargs")


def pair_of(
    row: Any, columns: Mapping[str, str], number: int, *, kind: str = "row", cut: list[int] | None = None
) -> PreferencePair:
    """A row as a record.

    Args:
        row: a mapping from columns to cells.
        columns: as in ``load_pairs``.
        number: of the row, for error messages.
        kind: what error messages call it.
        cut: gets the number where a text prompt was taken off the responses.

    Raises:
        RecordError: cells that make no record.
        KeyError: a column that is not there.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"{kind} {number} is a {type(row).__name__}; expected a mapping with {FIELDS}", number)
    with numbered(kind, number):
        values = _fields(row, columns, number, [] if cut is None else cut)
        image, taken = _image(row, columns.get("image"), number)
        tools = _tools(row.get("tools")) if not isinstance(values["prompt"], str) else None
        used = {*columns.values(), *FIELDS, *taken, *(("tools",) if tools else ())}
        if "prompt" not in row and "prompt" not in columns:
            used |= set(PROMPTS)
        meta = {str(key): value for key, value in row.items() if key not in used}
        if isinstance(values["prompt"], list):
            _require_nothing_for_the_template(values["prompt"], meta)
        return PreferencePair(**values, image=image, meta=meta, tools=tools)


def _require_nothing_for_the_template(prompt: Any, meta: Mapping[str, Any]) -> None:
    """Refuse what a conversation's row holds for the template beside its messages and tools (a ValueError)."""
    told = any(isinstance(m, Mapping) and m.get("role") in ("system", "developer") for m in prompt)
    for name in FOR_TEMPLATES:
        cell = meta.get(name)
        if is_missing(cell) or (isinstance(cell, (str, list, Mapping)) and not cell) or (told and name in SYSTEM):
            continue
        how = "begin the prompt with a message of role 'system'" if name in SYSTEM else "render the prompt"
        raise ValueError(
            f"the column {name!r} ({str(cell)[:60]!r}) would not reach the chat template; {how}, or drop the column"
        )


def _fields(row: Mapping[str, Any], columns: Mapping[str, str], number: int, cut: list[int]) -> dict[str, Text]:
    """Prompt, chosen and rejected, the prompt's own words left out of the responses."""
    responses = {name: _field(row, name, columns.get(name, name), number) for name in FIELDS[1:]}
    prompt = _given_prompt(row, columns, number)
    if prompt is None:
        parts = _split(responses["chosen"], responses["rejected"])
        if parts is None:
            raise _no_column(row, "prompt", "prompt", number)
        return dict(zip(FIELDS, parts, strict=True))
    if isinstance(prompt, str) and all(isinstance(r, list) for r in responses.values()):
        return _asked_in_messages(prompt, responses)
    if not isinstance(prompt, str):
        for name, response in responses.items():
            if isinstance(response, list) and repeats(prompt, response):
                responses[name] = response[len(prompt) :]
    elif all(repeats(prompt, response) for response in responses.values()):
        cut.append(number)
        words, prompt = prompt.strip(), prompt.rstrip()
        responses = {name: response.lstrip()[len(words) :] for name, response in responses.items()}
    return {"prompt": prompt, **responses}


def _given_prompt(row: Mapping[str, Any], columns: Mapping[str, str], number: int) -> Any:
    """The prompt's own cell; ``None`` where the row has none."""
    if "prompt" in columns or "prompt" in row:
        return _field(row, "prompt", columns.get("prompt", "prompt"), number)
    other = next((name for name in PROMPTS if row.get(name) is not None), None)
    return None if other is None else as_text(row[other])


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any] | None:
    """Prompt and responses of two whole conversations that begin alike; ``None`` where that cannot be told.

    Messages: all that they have in common (TRL's implicit prompt), but for the assistant's last ones. Texts: up to the last
    assistant's turn they both begin.
    """
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, list) and isinstance(rejected, list):
        while n and isinstance(chosen[n - 1], Mapping) and chosen[n - 1].get("role") == "assistant":
            n -= 1
        return (chosen[:n], chosen[n:], rejected[n:]) if 0 < n < max(len(chosen), len(rejected)) else None
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    ends = [turn.end() for turn in ASSISTANT_TURN.finditer(chosen[:n])]
    return (chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :]) if ends else None


def _asked_in_messages(prompt: str, responses: Mapping[str, Any]) -> dict[str, Any]:
    """A text prompt whose responses are whole conversations (UltraFeedback): the prompt is a message in both of them."""
    parts = _split(responses["chosen"], responses["rejected"])
    if parts is None or all(message.get("role") == "assistant" for message in parts[0]):
        raise ValueError(
            "a text prompt needs text responses; write the prompt as messages too if the responses are messages, or begin "
            "both responses with the user's message"
        )
    said = [message.get("content") for message in parts[0]]
    if not any(isinstance(words, str) and words.strip() == prompt.strip() for words in said):
        raise ValueError(
            f"the prompt {prompt!r} is not among the messages that chosen and rejected begin with ({said}); take the "
            "column out, or make them agree"
        )
    return dict(zip(FIELDS, parts, strict=True))


def _field(row: Mapping[str, Any], name: str, column: str, number: int) -> Any:
    if "{" in column:
        return _filled(row, name, column, number)
    if column not in row:
        raise _no_column(row, name, column, number)
    value = row[column]
    if is_missing(value):
        raise ValueError(f"{name} is missing (the cell {column!r} is empty)")
    try:
        value = as_text(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(value, (int, float, bool)):
        raise ValueError(
            f"{name} is {value!r}, a {type(value).__name__}; text or a list of messages is needed. For the number as text "
            f'map the column: columns={{"{name}": "{{{column}}}"}}'
        )
    return value


def _filled(row: Mapping[str, Any], name: str, template: str, number: int) -> str:
    """A template with its columns filled in; some of them may be empty, but not all."""
    used = _columns_of(template)
    absent = [column for column in used if column not in row]
    if absent:
        raise _no_column(row, name, absent[0], number)
    blank = [
        column
        for column in used
        if is_missing(row[column]) or (isinstance(row[column], str) and not row[column].strip())
    ]
    if used and len(blank) == len(set(used)):
        raise ValueError(f"{name}: the cells {blank} are missing; {template!r} would be filled with nothing")
    cells = {key: "" if is_missing(value) else plain(value) for key, value in row.items()}
    try:
        return template.format_map({key: Items(v) if isinstance(v, str) else v for key, v in cells.items()})
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {template!r} cannot be filled ({error})") from None


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: ``None``, NaN, or what pandas has for them."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def _no_column(row: Mapping[str, Any], name: str, column: str, number: int) -> KeyError:
    wanted = "" if column == name else f" for {name!r}"
    return KeyError(
        f"row {number} has no column {column!r}{wanted}; it has {list(row)}. "
        f'Map it: columns={{"{name}": "<your column>"}}, in a shell --column {name}="<your column>"'
    )


def _columns_of(template: str) -> list[str]:
    """Names of the columns a template uses."""
    fields = [field for _, field, _, _ in Formatter().parse(template) if field]
    return list(dict.fromkeys(re.split(r"[\[.]", field, maxsplit=1)[0] for field in fields))


class Items(str):
    """A cell; ``{cell}`` is its text and ``{cell[0]}`` the first item of its semicolon list."""

    def __getitem__(self, index: Any) -> str:
        items = [item.strip() for item in str.split(self, ";") if item.strip()]
        if int(index) >= len(items):
            raise ValueError(f"item [{index}] is wanted of a cell with {len(items)} items: {str(self)!r}")
        return items[int(index)]


def _image(row: Mapping[str, Any], column: str | None, number: int) -> tuple[Any, Collection[str]]:
    """The record's image or images, if it has any, and the columns they came from."""
    if column is not None and column not in row:
        raise KeyError(f"row {number} has no column {column!r} for 'image'; it has {list(row)}")
    names = IMAGES if column is None else (column,)
    images = [row[name] for name in names if row.get(name) is not None]
    image = images[0] if images else None
    return None if isinstance(image, (list, str)) and not image else image, names


def _tools(cell: Any) -> list[Any] | None:
    """The tools of a row; some data sets keep them as JSON."""
    if is_missing(cell):
        return None
    try:
        tools = json.loads(cell) if isinstance(cell, str) and cell.strip() else plain(cell)
    except ValueError as error:
        raise ValueError(f"tools are not valid JSON ({error}); give a list of tools, or the same as JSON") from None
    if tools and not isinstance(tools, list):
        raise ValueError(f"tools are a {type(tools).__name__}; expected a list of tools")
    return tools or None
