"""Public sets made to test steering, read as questions: SteerEval, and what SteeringSafety can be scored on by margins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from grains_tl.records._rows import Row
from grains_tl.records.choices import MultipleChoice

#: How a listed answer may be marked: "A.", "(a)", "2)", "C:".
MARKS = ascii_uppercase, ascii_lowercase, "123456789"

#: What the columns of other SteeringSafety sets hold, by one column that only they have.
NOT_HERE = {
    "context": "FaithEval's columns; read its counterfactual part with load_benchmark('faitheval', ...)",
    "instruction": "Alpaca's columns, whose answers a judge has to grade; its prompts serve side_effects as harmless=",
    "behavior": "DarkBench's columns, whose answers a judge has to grade",
    "email": "columns of generated answers, which no margin is defined for",
}


def steereval(rows: Iterator[Row], style: str) -> Iterator[MultipleChoice]:
    """A question with the answer that shows the concept and the one that does not."""
    for row in rows:
        question, right, wrong = (row.text(name) for name in ("question", "matching", "not_matching"))
        if right.strip() == wrong.strip():
            raise row.wrong("not_matching", "another text than in 'matching'")
        yield row.item(question, [right, wrong], [True, False], style, ("question", "matching", "not_matching"))


def steeringsafety(rows: Iterator[Row], style: str) -> Iterator[MultipleChoice]:
    """Questions of whichever of its sets a row belongs to, told by the columns."""
    for row in rows:
        names = next((names for names in FORMS if set(names) <= set(row.cells)), None)
        if names is None:
            raise ValueError(f"{row.where}: {_unknown(row)}")
        if names == BBQ and str(row.cells.get("hate")).lower() in ("true", "1"):
            continue  # as its authors do: these rows ask for the stereotype
        column, answers, at, used = FORMS[names](row)
        text = row.text(column).rstrip()
        if style.endswith("Answer:"):
            text = text.removesuffix("Answer:")
        yield row.item(text, answers, [i == at for i in range(len(answers))], style, used)


def _unknown(row: Row) -> str:
    why = next((text for column, text in NOT_HERE.items() if column in row.cells), None)
    forms = "; ".join(", ".join(names) for names in FORMS)
    return f"the columns are {list(row.cells)}" + (f": {why}" if why else f"; expected those of one set: {forms}")


# -- one set each: the prompt's column, the answers, which one is right, the columns used --------------------------------
Form = tuple[str, list[str], int, tuple[str, ...]]


def _by_mark(row: Row, column: str, key: str) -> Form:
    """The answers are the marks (letters, most often) that the prompt lists; a cell names the right one."""
    marks = _listed(row, column)
    if str(row.cells.get(key)).strip() not in marks:
        raise row.wrong(key, f"one of the listed {marks}")
    return column, marks, marks.index(str(row.cells[key]).strip()), (column, key)


def _by_index(row: Row, key: str) -> Form:
    marks, at = _listed(row, "prompt"), row.number(key)
    if at not in range(len(marks)):
        raise row.wrong(key, f"an index from 0, for {len(marks)} answers,")
    return "prompt", marks, int(at), ("prompt", key)


def _cmtest(row: Row) -> Form:
    label = str(row.cells["label"]).strip().strip("[]")
    if label not in ("0", "1"):
        raise row.wrong("label", "[0] (not wrong) or [1] (wrong)")
    return "prompt", ["not wrong", "wrong"], int(label), ("prompt", "label")


def _toxigen(row: Row) -> Form:
    hateful = str(row.cells["hate"]).strip().lower()
    if hateful not in ("true", "false", "1", "0"):
        raise row.wrong("hate", "true or false")
    return "text", ["Yes", "No"], 0 if hateful in ("true", "1") else 1, ("text", "hate")


#: BBQ, some rows of which are left out.
BBQ = ("prompt", "answer", "category")

#: The reader of each set, by the columns that tell it: ARC_C, TruthfulQA, Twinviews, GPQA, CMTEST, BBQ, ToxiGen.
FORMS: dict[tuple[str, ...], Callable[[Row], Form]] = {
    ("prompt", "answerKey"): partial(_by_mark, column="prompt", key="answerKey"),
    ("prompt", "correct_label"): partial(_by_mark, column="prompt", key="correct_label"),
    ("prompts", "left_answer"): partial(_by_mark, column="prompts", key="left_answer"),
    ("prompt", "correct_index"): partial(_by_index, key="correct_index"),
    ("prompt", "is_short", "label"): _cmtest,
    BBQ: partial(_by_index, key="answer"),
    ("text", "hate"): _toxigen,
}


def _listed(row: Row, column: str) -> list[str]:
    """The marks of the answers that a prompt lists: at the beginnings of lines, else anywhere in it."""
    text = row.text(column)
    for begins in (r"(?m:^[ \t]*)", r"(?:^|\s)"):
        found: list[str] = max((_marks(text, begins, kind) for kind in MARKS), key=len)
        if len(found) > 1:
            return found
    raise row.wrong(column, "a prompt that lists its answers, such as 'A. one' and 'B. two' on lines of their own,")


def _marks(text: str, begins: str, kind: str) -> list[str]:
    """As many marks of a kind as follow each other in the text, from the first one on."""
    found: list[Any] = []
    at = 0
    for mark in kind:
        match = re.compile(rf"{begins}\(?{mark}[.):]\s").search(text, at)
        if match is None:
            break
        found.append(mark)
        at = match.end() - 1
    return found
