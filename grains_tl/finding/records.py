"""Records for a search: looked over, and split into those to build on, to choose on and to report on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grains_tl._util.errors import RecordError
from grains_tl._util.files import hash_of
from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PairLike, PreferencePair, plain_text
from grains_tl.records.splits import record_id

#: The parts and the share of the records that each gets.
SHARES = {"build": 0.4, "choose": 0.2, "report": 0.4}

#: Fewer different records leave too little for three parts.
FEWEST = 8

#: The fewest records that each part may have where the caller splits.
FEWEST_IN_PART = {"build": 2, "choose": 2, "report": 3}


@dataclass(frozen=True)
class Parts:
    """Records in three parts without a record in common.

    Attributes:
        build: vectors are built from these.
        choose: each recipe's layer and alpha are chosen on these.
        report: effects are reported on these alone.
        notes: what a reader of the result should know about the records, one sentence each.
    """

    build: list[PreferencePair]
    choose: list[PreferencePair]
    report: list[PreferencePair]
    notes: tuple[str, ...] = field(default=())

    @property
    def sizes(self) -> dict[str, int]:
        """Records in each part."""
        return {name: len(getattr(self, name)) for name in SHARES}


def split_for_search(pairs: Iterable[PairLike] | Mapping[str, Any], seed: int) -> Parts:
    """Check the records and split them, or check the caller's own split.

    Records with the same prompt stay together. A record that is given several times counts once.

    Args:
        pairs: the records, or a mapping with the parts ``"build"``, ``"choose"`` and ``"report"``.
        seed: of the split.

    Raises:
        RecordError: fewer than 8 different records, a record that is there both ways round, parts that are missing, too
            small or have a record in common.
    """
    if isinstance(pairs, Mapping) and not {"prompt", "chosen"} & set(pairs):
        parts, notes = _own_parts(pairs)
    else:
        records, notes = _different(preference_pairs(pairs))
        if len(records) < FEWEST:
            raise RecordError(
                f"{len(records)} different records; expected at least {FEWEST}, which are split into some to build vectors "
                "from, some to choose layer and alpha on, and some to report on (30 or more give useful intervals)"
            )
        parts, unsplit = _split(records, seed)
        notes += unsplit
    return Parts(**parts, notes=(*notes, *_notes(parts)))


def _own_parts(pairs: Mapping[str, Any]) -> tuple[dict[str, list[PreferencePair]], list[str]]:
    if set(pairs) != set(SHARES):
        raise RecordError(f"the parts are {sorted(map(str, pairs))}; expected {list(SHARES)}, or one list of records")
    parts: dict[str, list[PreferencePair]] = {}
    notes: list[str] = []
    seen: dict[str, str] = {}
    for name in SHARES:
        parts[name], found = _different(preference_pairs(pairs[name]))
        notes += [f"{name}: {note}" for note in found]
        for number, record in enumerate(parts[name], start=1):
            earlier = seen.setdefault(record_id(record), name)
            if earlier != name:
                raise RecordError(
                    f"record {number} of {name} is in {earlier} too; effects measured on records that built or chose a "
                    "vector are too large, so the parts may have none in common",
                    number,
                )
        if len(parts[name]) < FEWEST_IN_PART[name]:
            raise RecordError(
                f"{len(parts[name])} different records to {name}; expected at least {FEWEST_IN_PART[name]}"
            )
    shared = {_prompt(r) for r in parts["report"]} & {_prompt(r) for n in ("build", "choose") for r in parts[n]}
    if shared:
        notes.append(
            f"{len(shared)} prompts of the report records stand in the other parts too (with other responses): the effect "
            "on new prompts may be smaller"
        )
    return parts, notes


def _different(records: Sequence[PreferencePair]) -> tuple[list[PreferencePair], list[str]]:
    """The records without copies; one that is there both ways round is refused."""
    first: dict[str, int] = {}
    kept, copies = [], 0
    for number, record in enumerate(records, start=1):
        earlier = first.setdefault(record_id(record), number)
        if earlier == number:
            kept.append(record)
            continue
        if records[earlier - 1].chosen != record.chosen:
            raise RecordError(
                f"records {earlier} and {number} are the same with chosen and rejected swapped, so they cancel; keep the "
                "one that is meant",
                number,
            )
        copies += 1
    notes = [f"{copies} of {len(records)} records are copies of others and count once."] if copies else []
    return kept, notes


def _split(records: Sequence[PreferencePair], seed: int) -> tuple[dict[str, list[PreferencePair]], list[str]]:
    """Whole groups of records with one prompt, in random order, to the part that is furthest from its share."""
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(_prompt(record), []).append(i)
    notes = []
    if max(map(len, groups.values())) > len(records) // 5:  # such groups would not fit the smallest part
        notes.append(
            "Many records share a prompt, so some prompts are in several parts: on new ones the effect may be smaller."
        )
        groups = {str(i): [i] for i in range(len(records))}
    listed = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(listed))
    taken: dict[str, list[int]] = {name: [] for name in SHARES}
    for group in sorted((listed[i] for i in order), key=len, reverse=True):  # stable: random among groups of one size
        lacking = {name: SHARES[name] * len(records) - len(taken[name]) for name in SHARES}
        taken[max(lacking, key=lambda name: lacking[name])] += group
    return {name: [records[i] for i in sorted(taken[name])] for name in SHARES}, notes


def _prompt(record: PreferencePair) -> str:
    """A prompt's name: text or conversation, and the picture it is about."""
    picture = "" if record.image is None else record_id(record)
    return hash_of([record.prompt, picture])


def _notes(parts: Mapping[str, Sequence[PreferencePair]]) -> Iterator[str]:
    """Sentences about responses that say less about the behaviour than about their wording."""
    everything = [record for part in parts.values() for record in part]
    for side in ("chosen", "rejected"):
        texts = {name: {plain_text(getattr(r, side)).strip() for r in part} for name, part in parts.items()}
        distinct = set().union(*texts.values())
        if len(distinct) == 1:
            yield (
                f"All {len(everything)} records have the same {side} response ({_short(next(iter(distinct)))}), so a vector "
                "may raise or lower that text alone; the effect on other wordings is not known."
            )
            continue
        again = texts["report"] & (texts["build"] | texts["choose"])
        if again:
            n = sum(plain_text(getattr(r, side)).strip() in again for r in parts["report"])
            yield (
                f"In {n} of {len(parts['report'])} report records the {side} response occurs word for word in the records "
                f"for building or choosing, such as {_short(min(again))}."
            )


def _short(text: str, longest: int = 50) -> str:
    return repr(text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}")
