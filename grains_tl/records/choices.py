"""Multiple-choice questions as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from grains_tl.records.pairs import PreferencePair, repeats, require_text
from grains_tl.types import Text


@dataclass(frozen=True)
class MultipleChoice:
    """A question with its answers.

    Attributes:
        prompt: text, or a list of messages.
        choices: the answers; text continues a text prompt directly (mind the leading space).
        labels: for every choice whether it is right. Where several are, the best one stands first among them: MC1 and
            ``pair`` look at that one.
        meta: any further columns of the source row.

    Raises:
        ValueError: fewer than two choices, not one label per choice, no right or no wrong choice, an empty choice, or
            one that is right twice or wrong twice.

    Examples:
        >>> item = MultipleChoice("2 + 2 =", (" 4", " 5", " 3"), (True, False, False))
        >>> item.pair().rejected
        ' 5'
    """

    prompt: Text
    choices: tuple[str, ...]
    labels: tuple[bool, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_text("the prompt", self.prompt)
        if len(self.choices) < 2 or len(self.choices) != len(self.labels):
            raise ValueError(
                f"{len(self.choices)} choices and {len(self.labels)} labels; expected at least two choices, and one "
                "label for each"
            )
        empty = [choice for choice in self.choices if not choice.strip()]
        if empty:
            raise ValueError(f"a choice is empty ({empty[0]!r}); every choice needs some text")
        for number, choice in enumerate(self.choices, start=1):
            require_text(f"choice {number}", choice)
        if all(repeats(self.prompt, choice) for choice in self.choices):
            raise ValueError("all choices begin with the whole prompt; leave it out of them")
        both = list(zip(self.choices, self.labels, strict=True))
        twice = [choice for i, (choice, label) in enumerate(both) if (choice, label) in both[:i]]
        if twice:
            raise ValueError(f"the choice {twice[0]!r} appears twice; remove one")
        if not any(self.labels) or self.wrong is None:
            raise ValueError(f"the labels are {self.labels}; expected at least one right choice and another wrong one")

    @property
    def best(self) -> int:
        """Index of the first right choice."""
        return self.labels.index(True)

    @property
    def wrong(self) -> int | None:
        """Index of the first wrong choice.

        TruthfulQA has answers on both sides: a wrong one with the words of ``best`` does not count.
        """
        words = self.choices[self.best]
        both = enumerate(zip(self.choices, self.labels, strict=True))
        return next((i for i, (choice, label) in both if not label and choice != words), None)

    def pair(self) -> PreferencePair:
        """The best right choice against the first wrong one."""
        assert self.wrong is not None
        return PreferencePair(self.prompt, self.choices[self.best], self.choices[self.wrong], meta=dict(self.meta))


# -- knowledge --------------------------------------------------------------------------------------------------------
def letters(item: MultipleChoice) -> MultipleChoice:
    """The same question with its answers listed in the prompt and letters to choose from, as MMLU is asked.

    Args:
        item: the question.

    Returns:
        A new question; its choices are `` A``, `` B``, ...

    Raises:
        ValueError: more choices than letters.

    Examples:
        >>> print(letters(MultipleChoice("2 + 2?", (" 4", " 5"), (True, False))).prompt)
        2 + 2?
        A. 4
        B. 5
        Answer:
    """
    if len(item.choices) > len(ascii_uppercase):
        raise ValueError(f"{len(item.choices)} choices; there are letters for {len(ascii_uppercase)}")
    listed = [f"{letter}. {text.strip()}" for letter, text in zip(ascii_uppercase, item.choices, strict=False)]
    block = "\n".join([*listed, "Answer:"])
    prompt: Text
    if isinstance(item.prompt, str):
        prompt = f"{item.prompt}\n{block}"
    else:
        last = item.prompt[-1]
        own, parts = last["content"], [{"type": "text", "text": f"\n{block}"}]
        asked = f"{own}\n{block}" if isinstance(own, str) else [*own, *parts]
        prompt = [*item.prompt[:-1], {**last, "content": asked}]
    answers = tuple(f" {letter}" for letter in ascii_uppercase[: len(item.choices)])
    return MultipleChoice(prompt, answers, item.labels, item.meta)
