"""The five sets as records to build on, to choose a layer on, and to test on; letters counterbalanced."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grains_tl as gr

#: Records of one building sample.
SAMPLE = 8

#: Longest question taken, in characters: leave-one-out runs the prompt once per token.
LONGEST = {"truthfulqa": 90, "survival-instinct": 200, "agreeableness": 60}

#: Records to build (a multiple of SAMPLE), to choose the layer, and to test.
SIZES = {
    "reviews": (80, 24, 60),
    "survival-instinct": (80, 24, 80),
    "misconceptions": (72, 20, 60),
    "truthfulqa": (80, 24, 80),
    "agreeableness": (80, 24, 80),
}

#: The same for a CPU.
SMALL = {name: (48 if name == "reviews" else 40, 8, 20) for name in SIZES}

#: Other wordings of the verdict on a review, (chosen, rejected); none shares a word with the set's own.
OTHER_WORDINGS = (
    (" something I would recommend to anyone", " something I would warn everyone about"),
    (" a real pleasure from start to finish", " a real disappointment from start to finish"),
    (" well worth the money", " a waste of money"),
    (" better than I had hoped", " worse than I had feared"),
)


@dataclass(frozen=True)
class RecordSet:
    """Records of one set.

    Attributes:
        name: of the set.
        build: records in samples of ``SAMPLE``.
        choose: to choose the layer on.
        test: to report on.
        per_question: how many records in a row are one question.
    """

    name: str
    build: list[gr.PreferencePair]
    choose: list[gr.PreferencePair]
    test: list[gr.PreferencePair]
    per_question: int

    @property
    def n_samples(self) -> int:
        return len(self.build) // SAMPLE


def record_set(name: str, data: Path | None, *, small: bool = False) -> RecordSet:
    """The records of a set, the same for every model.

    Args:
        name: one of ``SIZES``.
        data: the folder with ``truthfulqa/`` and ``anthropic_evals/``; not needed for the bundled sets.
        small: so many as ``SMALL`` says.

    Raises:
        ValueError: no ``data`` for a set that is not bundled, or too few questions.
    """
    sizes = SMALL[name] if small else SIZES[name]
    rng = random.Random(17)
    if name in ("reviews", "misconceptions"):
        bundled = "sentiment" if name == "reviews" else name
        pools = [gr.load_bundled(bundled, split) for split in ("build", "choose", "test")]
        build, choose, test = (rng.sample(pool, n) for pool, n in zip(pools, sizes, strict=True))
        return RecordSet(name, build, choose, test, per_question=1)
    if data is None:
        raise ValueError(f"{name} is not bundled; give the folder that holds its data")
    if name == "truthfulqa":
        benchmark = gr.records.load_benchmark(name, data / name / "truthfulqa_half.csv", prompt_format="qa")
        questions = [
            [p] for p in benchmark.pairs if max(map(len, (str(p.prompt), p.chosen, p.rejected))) < LONGEST[name]
        ]
    else:
        rows = [json.loads(line) for line in (data / "anthropic_evals" / f"{name}.jsonl").open(encoding="utf-8")]
        questions = list(_yes_no(rows) if name == "agreeableness" else _lettered(rows))
    per_question = len(questions[0])
    wanted = [n // per_question for n in sizes]
    if len(questions) < sum(wanted):
        raise ValueError(f"{name}: {len(questions)} short questions, {sum(wanted)} are needed")
    rng.shuffle(questions)
    if name == "agreeableness":  # as many statements to agree with as to deny, in every sample
        sides = [[q for q in questions if q[0].chosen == letter] for letter in ("A", "B")]
        questions = [q for both in zip(*sides, strict=False) for q in both]
    flat = [record for question in questions for record in question]
    a, b, c = sizes
    return RecordSet(name, flat[:a], flat[a : a + b], flat[a + b : a + b + c], per_question)


def _lettered(rows: list[dict[str, str]]) -> Iterator[list[gr.PreferencePair]]:
    """Questions with two options, as asked and with the options swapped."""
    for row in rows:
        text = row["question"].removesuffix("Answer:").rstrip()
        found = re.fullmatch(r"(.*?)\n\nChoices:\n \(A\) ([^\n]*)\n \(B\) ([^\n]*)", text, flags=re.DOTALL)
        if found is None or len(text) > LONGEST["survival-instinct"]:
            continue
        question, a, b = (part.strip() for part in found.groups())
        yield both_orders(question, a, b, chosen_first=row["answer_matching_behavior"].strip() == "(A)")


def _yes_no(rows: list[dict[str, str]]) -> Iterator[list[gr.PreferencePair]]:
    for row in rows:
        if len(row["statement"]) <= LONGEST["agreeableness"]:
            yes = row["answer_matching_behavior"].strip() == "Yes"
            yield both_orders(row["question"].strip(), "Yes", "No", chosen_first=yes)


def both_orders(question: str, a: str, b: str, *, chosen_first: bool) -> list[gr.PreferencePair]:
    """One question with its two options in both orders; a letter answers it, each letter once chosen and once rejected."""
    letters = ("A", "B") if chosen_first else ("B", "A")
    shown = [(a, b, *letters), (b, a, *letters[::-1])]
    return [
        gr.PreferencePair(f"{question}\n\nChoices:\n (A) {first}\n (B) {second}\n\nAnswer: (", chosen, rejected)
        for first, second, chosen, rejected in shown
    ]


def other_wordings(test: list[gr.PreferencePair]) -> list[gr.PreferencePair]:
    """Test records with other responses: the wordings in turn."""
    words = [OTHER_WORDINGS[i % len(OTHER_WORDINGS)] for i in range(len(test))]
    return [gr.PreferencePair(record.prompt, *pair) for record, pair in zip(test, words, strict=True)]
