"""Preference records in every container that people have them in: the same records from all, or an error with the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import grains_tl as gr
from grains_tl._util.errors import RecordError
from grains_tl.records.sources import read_rows

datasets = pytest.importorskip("datasets")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TEXTS = [{"prompt": f"Record {i} was read", "chosen": " well", "rejected": " badly"} for i in range(4)]
CHATS = [
    {"prompt": [user(f"Tea {i}?")], "chosen": [says("Yes.")], "rejected": [says(f"No, {i}.")], "kind": "x"}
    for i in range(3)
]
IMPLICIT = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"], "kind": "x"} for r in CHATS]  # type: ignore[operator]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def arrays(row: dict[str, Any]) -> dict[str, Any]:
    """As a parquet file read with pandas has messages: arrays of mappings."""
    return {name: np.array(cell, dtype=object) if isinstance(cell, list) else cell for name, cell in row.items()}


def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {
        name: [{"from": names[m["role"]], "value": m["content"]} for m in cell] if isinstance(cell, list) else cell
        for name, cell in row.items()
    }


def message_columns(row: dict[str, Any]) -> dict[str, Any]:
    """As older data sets give a sequence of messages: a mapping from keys to lists."""
    return {name: columns(cell) if isinstance(cell, list) else cell for name, cell in row.items()}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    suffix = path.suffix
    if suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


CONTAINERS: dict[str, Any] = {
    "list": lambda rows, _: rows,
    "iterator": lambda rows, _: iter(rows),
    "columns": lambda rows, _: columns(rows),
    "numpy columns": lambda rows, _: {k: pd.Series(v).to_numpy() for k, v in columns(rows).items()},
    "pandas": lambda rows, _: pd.DataFrame(rows),
    "arrow": lambda rows, _: datasets.Dataset.from_list(rows).data.table,
    "dataset": lambda rows, _: datasets.Dataset.from_list(rows),
    "dataset as numpy": lambda rows, _: datasets.Dataset.from_list(rows).with_format("numpy"),
    "dataset as pandas": lambda rows, _: datasets.Dataset.from_list(rows).with_format("pandas"),
    "streaming dataset": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "one split": lambda rows, _: datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}),
    "one split of rows": lambda rows, _: {"train": rows},
    "parquet": lambda rows, folder: written(folder / "r.parquet", rows),
    "csv": lambda rows, folder: written(folder / "r.csv", rows),
    "json": lambda rows, folder: written(folder / "r.json", rows),
    "jsonl": lambda rows, folder: written(folder / "r.jsonl", rows),
    "json as text": lambda rows, _: [
        {k: json.dumps(c) if isinstance(c, list) else c for k, c in r.items()} for r in rows
    ],
    "arrays": lambda rows, _: [arrays(row) for row in rows],
    "sharegpt": lambda rows, _: [sharegpt(row) for row in rows],
    "sharegpt parquet": lambda rows, folder: written(folder / "s.parquet", [sharegpt(row) for row in rows]),
    "columns of messages": lambda rows, _: [message_columns(row) for row in rows],
}


@pytest.mark.parametrize("rows", [TEXTS, CHATS, IMPLICIT], ids=["texts", "chats", "no prompt column"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_records(container: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = [(r["prompt"], r["chosen"], r["rejected"]) for r in (TEXTS if rows is TEXTS else CHATS)]
    found = gr.load_pairs(CONTAINERS[container](rows, tmp_path))
    assert [(p.prompt, p.chosen, p.rejected) for p in found] == wanted
    assert [dict(p.meta) for p in found] == [{"kind": "x"} if "kind" in row else {} for row in rows]


def test_sharegpt_rows_with_one_message_as_answer() -> None:
    """As LLaMA-Factory has them."""
    row = {
        "conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Tea?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    pair = gr.load_pairs([row])[0]
    assert pair.prompt == [{"role": "system", "content": "Be short."}, user("Tea?")] and dict(pair.meta) == {}
    assert (pair.chosen, pair.rejected) == ([says("Yes.")], [says("No.")])


def test_keys_that_arrow_fills_up_are_taken_away() -> None:
    calls = [
        {"function": {"name": "a", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "b", "arguments": {"day": 3}}},
    ]
    rows = [
        {"prompt": [user("Tea?")], "chosen": [says("x", tool_calls=[call])], "rejected": [says("No.")]}
        for call in calls
    ]
    pairs = gr.load_pairs(datasets.Dataset.from_list(rows))
    assert [p.chosen[0]["tool_calls"] for p in pairs] == [[call] for call in calls]  # type: ignore[index]
    assert pairs[0].rejected == [says("No.")]
    null = [says("x", tool_calls=[{"function": {"name": "a", "arguments": {"city": None}}}])]
    assert gr.load_pairs([{**rows[0], "chosen": null}])[0].chosen == null  # not from arrow: the null was meant


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train": TEXTS, "test": TEXTS}, r"splits \['train', 'test'\].*data\['train'\]"),
        (datasets.DatasetDict({s: datasets.Dataset.from_list(TEXTS) for s in ("a", "b")}), r"splits \['a', 'b'\]"),
        (TEXTS[0], "wrap the record in a list"),
        (CHATS[0], "wrap the record in a list"),
        ({**columns(TEXTS), "chosen": [" a"]}, "different lengths.*'chosen': 1"),
        (
            [TEXTS[0], {**TEXTS[1], "prompt": "[{'role': 'user' 'content': 'x'}]"}],
            "row 2: prompt: .*neither JSON nor a Python",
        ),
        ([{**CHATS[0], "prompt": [{"from": "narrator", "value": "x"}]}], "row 1: prompt: .*narrator.*human"),
        ([{**TEXTS[0], "prompt": b"bytes"}], "row 1: prompt is b'bytes', a bytes"),
        ([TEXTS[0], [1, 2]], "row 2 is a list; expected a mapping"),
        (3, "a int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_forms_that_cannot_be_read_are_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.load_pairs(source)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"p\.parquet: cannot be read as parquet"):
        gr.load_pairs(tmp_path / "p.parquet")


# -- iterators and limits (was a bug: one more was taken and lost) --------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_limit_takes_no_more_than_it_keeps(n: int) -> None:
    rows = iter(TEXTS)
    first, rest = gr.load_pairs(rows, limit=n), gr.load_pairs(rows)
    assert [p.prompt for p in (*first, *rest)] == [row["prompt"] for row in TEXTS]


def test_nothing_is_read_before_it_is_needed() -> None:
    taken: list[int] = []

    def source() -> Iterator[Mapping[str, Any]]:
        for i, row in enumerate(TEXTS):
            taken.append(i)
            yield row

    assert len(gr.load_pairs(source(), limit=2)) == 2 and taken == [0, 1]
    taken.clear()
    stream = datasets.IterableDataset.from_generator(source)
    assert len(gr.load_pairs(stream, limit=2)) == 2 and taken[-1] <= 2  # datasets itself looks at a row ahead


def test_a_limit_on_benchmarks_and_splits_of_iterators() -> None:
    rows = iter([{"question": f"{i} + 1?", "choices": ["3", "4", "5", "6"], "answer": 1} for i in range(4)])
    counts = [len(gr.records.load_benchmark("mmlu", rows, limit=2).items) for _ in range(2)]
    assert counts == [2, 2]
    pairs = gr.load_pairs(TEXTS)
    assert gr.records.split_records(iter(pairs)) == gr.records.split_records(pairs)


def test_lines_after_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(TEXTS[0]) + "\nnot json\n")
    assert len(gr.load_pairs(path, limit=1)) == 1
    rows = read_rows(path)
    assert next(rows)[0] == 1


# -- prompts that stand in the responses too ------------------------------------------------------------------------------

DIALOGUE = "\n\nHuman: Is tea hot?\n\nAssistant: Yes.\n\nHuman: And ice?\n\nAssistant:"


def test_hh_rlhf_rows_without_a_prompt() -> None:
    pair = gr.load_pairs([{"chosen": DIALOGUE + " No.", "rejected": DIALOGUE + " Never."}])[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == (DIALOGUE, " No.", " Never.")
    parting = DIALOGUE[: DIALOGUE.index("Yes") - 1]
    rows = [{"chosen": DIALOGUE + " No.", "rejected": DIALOGUE.replace("Yes", "Perhaps") + " No."}]
    assert gr.load_pairs(rows)[0].prompt == parting


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_a_text_prompt_in_both_responses_is_taken_off(space: str) -> None:
    row = {"prompt": DIALOGUE + space, "chosen": DIALOGUE + " No.", "rejected": DIALOGUE.lstrip() + " Never."}
    with pytest.warns(UserWarning, match="1 of 1 records both responses begin with the whole prompt"):
        pair = gr.load_pairs([row])[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == (DIALOGUE, " No.", " Never.")
    with pytest.raises(ValueError, match="begin with the whole prompt"):
        gr.PreferencePair(DIALOGUE, DIALOGUE + " No.", DIALOGUE + " Never.")


def test_an_answer_that_quotes_the_question_stays() -> None:
    row = {"prompt": "Is tea hot?", "chosen": "Is tea hot? Yes.", "rejected": " No."}
    assert gr.load_pairs([row])[0].chosen == row["chosen"]
    short = {"prompt": "No", "chosen": "No way", "rejected": "No thanks"}
    with pytest.warns(UserWarning, match="without a space"):
        assert gr.load_pairs([short])[0].chosen == "No way"


@pytest.mark.parametrize("prompt", [[user("Is tea hot?")], "Is tea hot?"])
def test_messages_of_the_prompt_in_the_responses(prompt: Any) -> None:
    row = {
        "prompt": prompt,
        "chosen": [user("Is tea hot?"), says("Yes.")],
        "rejected": [user("Is tea hot?"), says("No.")],
    }
    pair = gr.load_pairs([row])[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Is tea hot?")], [says("Yes.")], [says("No.")])
    if not isinstance(prompt, str):
        half = gr.load_pairs([{**row, "rejected": [says("No.")]}])[0]
        assert half == pair


def test_a_prompt_that_disagrees_with_the_responses() -> None:
    row = {
        "prompt": "Is ice hot?",
        "chosen": [user("Is tea hot?"), says("Yes.")],
        "rejected": [user("Is tea hot?"), says("No.")],
    }
    with pytest.raises(RecordError, match="row 1: the prompt 'Is ice hot[?]' is not among the messages"):
        gr.load_pairs([row])


def test_texts_without_a_prompt_are_no_records() -> None:
    with pytest.raises(KeyError, match="row 1 has no column"):
        gr.load_pairs([{"chosen": "Tea is hot.", "rejected": "Tea is cold."}])


# -- cells ----------------------------------------------------------------------------------------------------------------

TEMPLATES = {"prompt": "{context}Q: {question}\nA:", "chosen": " {good}.", "rejected": " {bad[0]}."}
CELLS = {"context": "", "question": "Is tea hot?", "good": "Yes", "bad": "No; Never"}


@pytest.mark.parametrize("empty", ["", "  ", None, float("nan"), pd.NA, pd.NaT, np.float64("nan")])
@pytest.mark.parametrize("column", ["good", "bad"])
def test_a_template_of_empty_cells_is_refused(column: str, empty: Any) -> None:
    with pytest.raises(RecordError, match=f"row 2: .*{column}.* missing") as error:
        gr.load_pairs([CELLS, {**CELLS, column: empty}], TEMPLATES)
    assert error.value.number == 2


@pytest.mark.parametrize("empty", ["", None, float("nan"), pd.NA])
def test_an_optional_cell_may_be_empty(empty: Any) -> None:
    pair = gr.load_pairs([{**CELLS, "context": empty}], TEMPLATES)[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q: Is tea hot?\nA:", " Yes.", " No.")


def test_csv_and_pandas_agree_on_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('context,question,good,bad\n,Is tea hot?,Yes,No\n,"Is ice?",,No\n')
    for source in (path, pd.read_csv(path)):
        assert gr.load_pairs(source, TEMPLATES, limit=1)[0].prompt == "Q: Is tea hot?\nA:"
        with pytest.raises(RecordError, match="row 2: chosen"):
            gr.load_pairs(source, TEMPLATES)


@pytest.mark.parametrize("value", [float("nan"), None, pd.NA, 4, 4.5, True, np.int64(4), np.float64("nan")])
@pytest.mark.usefixtures("unchecked")
def test_cells_that_are_no_text_name_the_row(value: Any) -> None:
    with pytest.raises(RecordError, match="row 2: chosen is") as error:
        gr.load_pairs([TEXTS[0], {**TEXTS[1], "chosen": value}])
    assert error.value.number == 2
    as_text = {"chosen": " {chosen}"}
    if isinstance(value, (int, np.int64)) and not isinstance(value, bool):
        assert gr.load_pairs([{**TEXTS[1], "chosen": value}], as_text)[0].chosen.strip() == str(value)  # type: ignore[union-attr]


HALF = "So good \ud83d it was"


@pytest.mark.parametrize(
    "row",
    [
        {**TEXTS[0], "prompt": HALF},
        {**TEXTS[0], "rejected": HALF},
        {**CHATS[0], "prompt": [user(HALF)]},
        {**CHATS[0], "chosen": [says("a", reasoning_content=HALF)]},
        {**CHATS[0], "prompt": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    ],
)
def test_half_a_character_is_refused_when_read(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, [TEXTS[1], row])))
    with pytest.raises(RecordError, match="row 2: .*half a character"):
        gr.load_pairs(path)


def test_half_a_character_elsewhere(bridge: Any) -> None:
    with pytest.raises(RecordError, match="prompt 1: .*half a character"):
        gr.generate(bridge, HALF)
    with pytest.raises(ValueError, match="choice 2 contains half a character"):
        gr.MultipleChoice("So", (" a", HALF), (True, False))


# -- mappings in place of records -----------------------------------------------------------------------------------------


def test_mappings_are_taken_wherever_pairs_are(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    assert gr.tokens.tokenize_pairs(bridge, rows) == gr.tokens.tokenize_pairs(bridge, pairs)
    assert gr.score_pairs(bridge, rows).equal(gr.score_pairs(bridge, pairs))
    assert gr.build_vectors(bridge, rows, top_k=1).directions.equal(gr.build_vectors(bridge, pairs, top_k=1).directions)
    assert gr.baselines.with_system_prompt(rows, "So.") == gr.baselines.with_system_prompt(pairs, "So.")
    with pytest.raises(RecordError, match="record 2: chosen equals rejected"):
        gr.score_pairs(bridge, [rows[0], {**rows[1], "chosen": "a", "rejected": "a"}])
