"""Questions that are answered by a letter, or by Yes and No, asked once with each order of their answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from grains_tl._util.errors import RecordError, numbered
from grains_tl.records.pairs import PreferencePair

#: A line that lists an answer: " (A) Yes", "B. No", "(C): Perhaps".
OPTION = re.compile(
    r"^(?P<before>[ \t]*\(?)(?P<letter>[A-Z])(?P<after>\)?[.:]?[ \t]+)(?P<text>\S.*?)[ \t]*$", re.MULTILINE
)

#: A response that is a letter: " (A)", "B", "C.".
LETTER = re.compile(r"^\s*\(?([A-Z])\)?[.:]?\s*$")

#: The longest answers that are listed: they stand for fixed ones such as Yes and No.
LONGEST = 20


def counterbalanced(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    r"""Every record twice, so that no letter says which answer is meant.

    - Answers listed in the prompt and named by letters (``(A) Yes``, ``(B) No``): once as it stands, and once with the two
      answers in each other's place and the letters swapped.
    - Short answers without a list (Yes and No): the answers are listed as ``(A)`` and ``(B)``, once in each order, and
      letters are the responses. That changes the question, so build and test in this form alike.

    Args:
        pairs: text prompts. Both kinds may be mixed.

    Returns:
        Twice as many records: each one followed by its counterpart.

    Raises:
        RecordError: a record of neither kind, by its number.

    Examples:
        >>> pair = PreferencePair("Shut down?\n (A) Yes\n (B) No\nAnswer:", " (A)", " (B)")
        >>> [(p.prompt[10:29], p.chosen) for p in counterbalanced([pair])]
        [('\n (A) Yes\n (B) No\nA', ' (A)'), ('\n (A) No\n (B) Yes\nA', ' (B)')]
    """
    out = []
    for number, pair in enumerate(pairs, start=1):
        with numbered("record", number):
            own = pair if LETTER.match(str(pair.chosen)) else _listed(pair)
            out += [own, _swapped(own)]
    return out


def _swapped(pair: PreferencePair) -> PreferencePair:
    """The same question with the two answers in each other's place."""
    if not all(isinstance(part, str) for part in (pair.prompt, pair.chosen, pair.rejected)):
        raise RecordError("balanced=True needs text prompts with listed answers; this one is a conversation")
    a, b = (LETTER.match(str(response)) for response in (pair.chosen, pair.rejected))
    listed = {m["letter"]: m for m in OPTION.finditer(str(pair.prompt))}  # of repeats (examples before) the last
    if a is None or b is None or a[1] not in listed or b[1] not in listed:
        raise RecordError(
            f"responses {pair.chosen!r} and {pair.rejected!r} are not two of the letters that its prompt lists "
            f"({', '.join(listed) or 'none'}), so its answers cannot be swapped; leave balanced out, or drop the record"
        )
    first, second = sorted((listed[a[1]], listed[b[1]]), key=lambda m: m.start())
    text = str(pair.prompt)
    swapped = (
        text[: first.start("text")]
        + second["text"]
        + text[first.end("text") : second.start("text")]
        + first["text"]
        + text[second.end("text") :]
    )
    return replace(pair, prompt=swapped, chosen=pair.rejected, rejected=pair.chosen)


def _listed(pair: PreferencePair) -> PreferencePair:
    """A question with short answers, asked with its answers as (A) and (B), in alphabetical order."""
    if not all(isinstance(part, str) for part in (pair.prompt, pair.chosen, pair.rejected)):
        raise RecordError("balanced=True needs text prompts; this one is a conversation")
    chosen, rejected = str(pair.chosen).strip(), str(pair.rejected).strip()
    if max(len(chosen), len(rejected)) > LONGEST:
        raise RecordError(
            f"balanced=True is for answers by a letter or a word; {max(chosen, rejected, key=len)!r} is too long to be one"
        )
    answers = sorted((chosen, rejected))
    block = "\n".join(f" ({letter}) {answer}" for letter, answer in zip("AB", answers, strict=True))
    prompt, end = str(pair.prompt), re.search(r"\n[^\n]*:\s*$", str(pair.prompt))  # "Answer:" stays last
    cut = len(prompt) if end is None else end.start()
    asked = f"{prompt[:cut].rstrip()}\n\nChoices:\n{block}{prompt[cut:]}"
    letter = {answer: f" ({name})" for name, answer in zip("AB", answers, strict=True)}
    return replace(pair, prompt=asked, chosen=letter[chosen], rejected=letter[rejected])


def unequal_answers(chosen: Sequence[str], rejected: Sequence[str]) -> str:
    """A sentence about fixed answers that are chosen and rejected unequally often; empty if there is nothing to say.

    A vector built from such records learns which answer is chosen more often. Nothing is said of more than four different
    answers unless they are letters, of sides without an answer in common, or of answers that are always on one side (what
    is asked for).

    Args:
        chosen: the chosen responses.
        rejected: the rejected ones.

    Examples:
        >>> unequal_answers([" (A)", " (A)", " (B)"], [" (B)", " (B)", " (A)"])
        "' (A)' 2 times chosen, 1 rejected; ' (B)' 1 times chosen, 2 rejected"
        >>> unequal_answers([" (A)", " (B)"], [" (B)", " (A)"])
        ''
    """
    up, down = Counter(chosen), Counter(rejected)
    both = sorted(set(up) & set(down))
    few = len({*up, *down}) <= 4 or all(map(LETTER.match, (*up, *down)))
    if len(chosen) < 2 or not both or not few or up == down:
        return ""
    return "; ".join(f"{word!r} {up[word]} times chosen, {down[word]} rejected" for word in both)
