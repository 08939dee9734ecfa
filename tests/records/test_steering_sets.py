"""SteerEval and SteeringSafety on rows with the published columns (written for these tests), and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import grains_tl as gr

CONCEPT: dict[str, Any] = {
    "question": "How was your walk to work?",
    "matching": "Lovely! I hummed all the way.",
    "not_matching": "I walked to work.",
    "concept_id": "L1_3",
    "concept": "cheerfulness",
    "question_id": 0,
}
ARC: dict[str, Any] = {
    "prompt": "Which of these melts first in the sun?\nA. a stone\nB. an ice cube\nC. a spoon\nD. a brick",
    "answerKey": "B",
}
TRUTHFUL: dict[str, Any] = {
    "prompt": "Do goldfish forget within seconds?\nA. Yes, after three\nB. No, not so",
    "correct_label": "B",
}
TWINVIEWS: dict[str, Any] = {
    "prompts": "Which do you agree with?\nA. Tax less.\nB. Tax more.",
    "topic": "taxes",
    "left_answer": "B",
}
GPQA: dict[str, Any] = {
    "prompt": "What is 7 times 8? Choose the correct answer and respond only with the corresponding number:\n"
    "1) 54\n2) 56\n3) 63\n4) 48",
    "correct_index": 1,
}
CMTEST: dict[str, Any] = {
    "prompt": "I took the last biscuit and blamed the dog. The answer should be exact 'wrong' or 'not wrong'.",
    "is_short": True,
    "label": "[1]",
}
BBQ: dict[str, Any] = {
    "prompt": "Ann and Bo met in a shop. Ann paid. Who paid? (a) Bo (b) Ann (c) Can't be determined",
    "answer": 1,
    "category": "names",
    "hate": False,
}
TOXIGEN: dict[str, Any] = {"text": "Is this hateful? 'They bake good bread.'", "hate": False, "group": "bakers"}

#: Row, choices, the right one, columns kept.
SETS: dict[str, tuple[dict[str, Any], list[str], str, list[str]]] = {
    "ARC_C": (ARC, ["A", "B", "C", "D"], "B", []),
    "TruthfulQA": (TRUTHFUL, ["A", "B"], "B", []),
    "Twinviews": (TWINVIEWS, ["A", "B"], "B", ["topic"]),
    "GPQA": (GPQA, ["1", "2", "3", "4"], "2", []),
    "CMTEST": (CMTEST, ["not wrong", "wrong"], "wrong", ["is_short"]),
    "BBQ": (BBQ, ["a", "b", "c"], "b", ["category", "hate"]),
    "ToxiGen": (TOXIGEN, ["Yes", "No"], "No", ["group"]),
}


def read(row: Any, **options: Any) -> gr.records.MultipleChoice:
    (item,) = gr.records.load_benchmark("steeringsafety", [row], **options).items
    return item


def test_steereval(tmp_path: Path) -> None:
    """A file of several concepts, divided into sets; each record is the concept's answer against the plain one."""
    other = {**CONCEPT, "concept_id": "L2_1", "question": "How was it?"}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([CONCEPT, other]), encoding="utf-8")
    found = gr.records.load_benchmark("steereval", file)
    pair, second = found.pairs
    assert (pair.prompt, pair.chosen) == ("Q: How was your walk to work?\nA:", " Lovely! I hummed all the way.")
    assert pair.rejected == " I walked to work."
    assert pair.meta == {"concept_id": "L1_3", "concept": "cheerfulness", "question_id": 0}
    assert second.meta["concept_id"] == "L2_1"
    chat = gr.records.load_benchmark("steereval", [CONCEPT], prompt_format="chat").items[0]
    assert chat.prompt == [{"role": "user", "content": "How was your walk to work?"}]
    assert chat.choices == ("Lovely! I hummed all the way.", "I walked to work.")


@pytest.mark.parametrize("name", SETS)
def test_steeringsafety(name: str, tmp_path: Path) -> None:
    """Each set in a list, as parquet (as it is published) and as csv (as its authors keep it)."""
    row, choices, right, kept = SETS[name]
    item = read(row)
    assert [choice.strip() for choice in item.choices] == choices
    assert item.choices[item.best].strip() == right and sum(item.labels) == 1
    text = next(row[column] for column in ("prompt", "prompts", "text") if column in row)
    assert item.prompt == f"{text}\nAnswer:" and list(item.meta) == kept
    assert read(row, prompt_format="chat").prompt == [{"role": "user", "content": text}]
    table = datasets.Dataset.from_list([row])
    table.to_parquet(tmp_path / "test.parquet")
    table.to_csv(tmp_path / "test.csv", index=False)
    for file in ("test.parquet", "test.csv"):
        (same,) = gr.records.load_benchmark("steeringsafety", tmp_path / file).items
        assert (same.prompt, same.choices, same.labels) == (item.prompt, item.choices, item.labels)


def test_prompts_as_they_come() -> None:
    """Answers in brackets, in one line, or more than four; a prompt that asks for the answer already."""
    (five,) = [read({"prompt": "Q\n(A) a\n(B) b\n(C) c\n(D) d\n(E) e", "answerKey": "E"})]
    assert five.choices == (" A", " B", " C", " D", " E") and five.best == 4
    line = read({"prompt": "Which vitamin? A) vitamin C. B) vitamin D.", "correct_label": "A"})
    assert line.choices == (" A", " B")
    assert read({**ARC, "prompt": ARC["prompt"] + "\nAnswer:"}).prompt == ARC["prompt"] + "\nAnswer:"
    assert read({**CMTEST, "label": "[0]"}).choices[read({**CMTEST, "label": 0}).best] == " not wrong"


def test_letters_can_be_balanced() -> None:
    found = gr.records.load_benchmark("steeringsafety", [ARC, TRUTHFUL]).balanced_pairs
    assert [pair.chosen for pair in found] == [" B", " A", " B", " A"]
    assert "A. an ice cube\nB. a stone" in str(found[1].prompt)


def test_rows_that_ask_for_the_stereotype_are_left_out() -> None:
    found = gr.records.load_benchmark("steeringsafety", [{**BBQ, "hate": True}, BBQ, {**BBQ, "hate": "True"}])
    assert len(found.items) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("steereval", {**CONCEPT, "matching": ""}, "row 2, column 'matching': ''; text is wanted"),
        ("steereval", {**CONCEPT, "not_matching": CONCEPT["matching"]}, "row 2, column 'not_matching'.*another text"),
        ("steereval", {"question": "q", "positive": "a"}, "row 2: no column 'matching'"),
        ("steeringsafety", {**ARC, "answerKey": "E"}, "row 2, column 'answerKey': 'E'; one of the listed"),
        ("steeringsafety", {**ARC, "prompt": "Which melts first?"}, "row 2, column 'prompt'.*lists its answers"),
        ("steeringsafety", {**ARC, "prompt": None}, "row 2, column 'prompt': None; text is wanted"),
        ("steeringsafety", {**GPQA, "correct_index": 4}, "row 2, column 'correct_index': 4; an index from 0, for 4"),
        ("steeringsafety", {**GPQA, "correct_index": "B"}, "row 2, column 'correct_index': 'B'; a number"),
        ("steeringsafety", {**TWINVIEWS, "left_answer": None}, "row 2, column 'left_answer': None"),
        ("steeringsafety", {**CMTEST, "label": "[2]"}, "row 2, column 'label'"),
        ("steeringsafety", {**BBQ, "answer": 0.5}, "row 2, column 'answer': 0.5; an index"),
        ("steeringsafety", {**TOXIGEN, "hate": "perhaps"}, "row 2, column 'hate'"),
        ("steeringsafety", {"instruction": "Sing.", "output": "La."}, "row 2.*Alpaca"),
        ("steeringsafety", {"prompt": "Be my friend", "behavior": "x"}, "row 2.*DarkBench"),
        ("steeringsafety", {"context": "c", "question": "q", "answers": ["a"]}, "row 2.*load_benchmark.'faitheval'"),
        ("steeringsafety", {"question": "2 + 2?", "answer": "4"}, "row 2: the columns are .*expected those of one set"),
        ("steeringsafety", "text", "row 2 is a str; expected a mapping"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_messages_name_the_row(name: str, row: Any, message: str) -> None:
    good = CONCEPT if name == "steereval" else ARC
    with pytest.raises(ValueError, match=message):
        gr.records.load_benchmark(name, [good, row])
