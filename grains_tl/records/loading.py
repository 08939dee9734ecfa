"""Preference records from files, lists, tables and data sets, and the two sets that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from itertools import islice
from os import PathLike
from typing import Any, Literal, get_args

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError, RecordError
from grains_tl._util.warn import warn_caller
from grains_tl.records.balance import counterbalanced
from grains_tl.records.columns import FIELDS, pair_of
from grains_tl.records.pairs import PreferencePair
from grains_tl.records.sources import read_rows, source_name

BUNDLED = ("sentiment", "misconceptions")

#: The words of bundled responses: those that stand in the set, or a second way to say the same.
Wording = Literal["own", "other"]

#: The first bundled neutral texts, which are for measuring costs: recipes that need such texts build with the others.
COST_TEXTS = 12


def neutral_texts(n: int | None = None) -> list[str]:
    """The first ``n`` (default all 30) of the short neutral texts that ship with the package.

    Args:
        n: how many texts, 1 to 30; default all.

    Returns:
        The texts.

    Raises:
        ValueError: ``n`` is not between 1 and 30.

    Examples:
        >>> len(neutral_texts()), neutral_texts(1)[0][:9]
        (30, 'The ferry')
    """
    lines = (resources.files("grains_tl") / "data_files" / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    if n is not None and not 1 <= whole("n", n) <= len(lines):
        raise ValueError(f"{n} neutral texts; there are 1 to {len(lines)}")
    return [json.loads(line)["text"] for line in lines[:n]]


def load_pairs(
    source: Any,
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    balanced: bool = False,
) -> list[PreferencePair]:
    r"""Read preference records.

    Args:
        source: a ``.jsonl`` / ``.json`` / ``.csv`` / ``.parquet`` path; an iterable of mappings or ``PreferencePair``, read
            only as far as ``limit``; a mapping from columns to lists; a ``datasets.Dataset`` (any format, also streaming); a
            ``pandas``, ``polars`` or arrow table. Conversations may be lists or arrays of messages, ShareGPT's turns, or
            either of them as text in one cell; without a prompt column they are split where chosen and rejected part (texts:
            after the last ``Assistant:`` they share). ``tools`` of a conversation are kept for the chat template.
        columns: where the fields stand if they have other names: a column name, or a template with ``{column}`` in it,
            e.g. ``{"prompt": "Q: {Question}\nA:", "chosen": " {Best Answer}"}``. A semicolon list such as TruthfulQA's
            is read with ``{Incorrect Answers[0]}``: the first of its items. ``"image"`` too has a default, the column
            ``image`` or ``images``.
        limit: keep the first ``limit`` records.
        balanced: for questions answered by a letter, or by Yes and No: every record twice, with the answers swapped, so
            that no letter says which one is meant (``limit`` counts the questions).

    Returns:
        Records in the order of the source; other columns are kept in ``meta``. A prompt that stands in front of both
        responses too is taken off them.

    Raises:
        RecordError: an empty field (in a template: all its cells), ``chosen`` equal to ``rejected``, numbers in place of
            text, half a character, turns that cannot be read; the message names the row (from 1).
        ValueError: no records, several splits, a broken line, text that is not UTF-8; the message names the line (from 1).
        KeyError: a missing column; the message lists the columns that are there.
        FileNotFoundError: the path does not exist.

    Warns:
        UserWarning: repeated records (they are kept, and count twice); responses that are glued to the prompt's last word,
            because they have no leading space; text prompts that were taken off their responses.

    Examples:
        >>> pairs = load_pairs([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> len(pairs), pairs[0].chosen
        (1, ' 4')
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise OptionError(f"columns={columns!r}; a mapping such as {{'prompt': '<your column>'}} is needed")
    limit = None if limit is None else whole("limit", limit, 1)
    known = (*FIELDS, "image")
    unknown = set(columns or {}) - set(known)
    if unknown:
        raise OptionError(f"columns maps {sorted(unknown)}, but a record has only {known}")
    rows = islice(read_rows(source), limit)  # takes no row that it does not keep: an iterator can be read on
    pairs: list[PreferencePair] = []
    cut: list[int] = []
    for number, row in rows:
        pairs.append(row if isinstance(row, PreferencePair) else pair_of(row, columns or {}, number, cut=cut))
    if not pairs:
        raise ValueError(
            f"no records in {source_name(source)}; expected a list or file with at least one preference pair"
        )
    _warn_of_repeats(pairs, source)
    _warn_of_glue(pairs, source)
    if cut:
        warn_caller(
            f"{source_name(source)}: in {len(cut)} of {len(pairs)} records both responses begin with the whole prompt (the "
            f"first: row {cut[0]}); it was taken off them",
        )
    return counterbalanced(pairs) if balanced else pairs


def preference_pairs(pairs: Iterable[Any]) -> list[PreferencePair]:
    """The records as a list; mappings with prompt, chosen and rejected are read as ``load_pairs`` reads them.

    Args:
        pairs: records, or mappings.

    Raises:
        RecordError: something else among them; the message names the record (from 1).
        ValueError: no list, such as one record alone or a path.
    """
    if isinstance(pairs, (PreferencePair, str, PathLike, Mapping)) or not hasattr(pairs, "__iter__"):
        raise ValueError(
            f"records are a {type(pairs).__name__}; expected a list of PreferencePair: load_pairs(...), or [pair] for one"
        )
    records = []
    for number, record in enumerate(pairs, start=1):
        if isinstance(record, Mapping):
            record = pair_of(record, {}, number, kind="record")
        if not isinstance(record, PreferencePair):
            raise RecordError(
                f"record {number} is a {type(record).__name__}; expected a PreferencePair, or a mapping with prompt, "
                "chosen and rejected",
                number,
            )
        records.append(record)
    return records


def load_bundled(name: str, split: str | None = None, *, wording: Wording = "own") -> list[PreferencePair]:
    """One of the preference sets that ship with the package (written for it, MIT).

    Args:
        name: ``"sentiment"`` (mixed reviews: 88 build, 24 choose, 104 test) or ``"misconceptions"`` (72, 20, 60). The
            three splits come from different domains, so a gain on the test split is transfer.
        split: ``"build"``, ``"choose"``, ``"test"``, or ``None`` for all. ``meta`` holds split and domain, and for
            sentiment the word that carries the good and the bad detail.
        wording: ``"own"``, or ``"other"``: both responses of the test records said in other words, which tells a vector
            that moves the behaviour from one that raises the words it was built from.

    Returns:
        The records, in the order of the file.

    Raises:
        ValueError: an unknown set, split or wording; other wordings of records that have none.

    Examples:
        >>> len(load_bundled("sentiment", "build"))
        88
        >>> load_bundled("sentiment", "test")[0].chosen, load_bundled("sentiment", "test", wording="other")[0].chosen
        (' great', ' one I would gladly watch again')
    """
    if name not in BUNDLED:
        raise OptionError(f"no bundled set {name!r}; there are {BUNDLED}")
    if split not in (None, "build", "choose", "test"):
        raise OptionError(f"no split {split!r}; there are build, choose and test")
    if wording not in get_args(Wording):
        raise OptionError(f"wording={wording!r}; expected 'own' or 'other'")
    if wording == "other" and split != "test":
        raise OptionError(f"wording='other' of split {split!r}: only the test records have other wordings; give 'test'")
    columns = {"chosen": "chosen_other", "rejected": "rejected_other"} if wording == "other" else None
    with resources.as_file(resources.files("grains_tl") / "data_files" / f"{name}.jsonl") as path:
        rows = [row for _, row in read_rows(path) if split is None or row["split"] == split]
    return load_pairs(rows, columns)


def _warn_of_repeats(pairs: list[PreferencePair], source: Any) -> None:
    first: dict[str, int] = {}
    again = []
    for number, pair in enumerate(pairs, start=1):
        if pair.image is None:
            key = repr((pair.prompt, pair.chosen, pair.rejected))
            if first.setdefault(key, number) != number:
                again.append(number)
    if again:
        warn_caller(
            f"{source_name(source)}: {len(again)} of {len(pairs)} records repeat earlier ones (the first: record "
            f"{again[0]}); they count twice, and standard errors take them as independent",
        )


def _warn_of_glue(pairs: list[PreferencePair], source: Any) -> None:
    """Only between unaccented letters and digits: other scripts may do without spaces."""
    glued = [
        (number, f"{prompt.split()[-1]}{response.split()[0]}")
        for number, pair in enumerate(pairs, start=1)
        for prompt, response in ((pair.prompt, pair.chosen), (pair.prompt, pair.rejected))
        if isinstance(prompt, str) and isinstance(response, str)
        if all(end.isascii() and end.isalnum() for end in (prompt[-1:], response[:1]))
    ]
    if glued:
        number, word = glued[0]
        warn_caller(
            f"{source_name(source)}: {len(glued)} of {2 * len(pairs)} responses follow the prompt without a space (record "
            f"{number} reads ...{word!r}); begin them with one",
        )
