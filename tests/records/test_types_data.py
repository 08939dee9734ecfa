"""Reading preference records: every format, every refusal, and the bundled sets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr

RECORD: dict[str, Any] = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
TRUTHFULQA_COLUMNS = {
    "prompt": "Question: {Question}\nAnswer:",
    "chosen": " {Best Answer}",
    "rejected": " {Incorrect Answers[0]}",
}
TRUTHFULQA_HEADER = "Category,Question,Best Answer,Incorrect Answers\n"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def attribution(
    scores: list[float], gap: float | None = None, ends: tuple[float, float | None] = (1.0, None)
) -> gr.Attribution:
    n = len(scores)
    return gr.Attribution(
        scores=torch.tensor(scores),
        tokens=[f"t{i}" for i in range(n)],
        content=torch.ones(n, dtype=torch.bool),
        is_image=torch.zeros(n, dtype=torch.bool),
        gap=gap,
        objective=ends[0],
        baseline_objective=ends[1],
        method="leave_one_out",
    )


# -- formats ----------------------------------------------------------------------------------------------------------


def test_python_records_keep_order_and_other_columns() -> None:
    rows = [{**RECORD, "domain": "sums"}, {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]
    pairs = gr.load_pairs(rows)
    assert [p.prompt for p in pairs] == ["2 + 2 =", "1 + 1 ="]
    assert (pairs[0].chosen, pairs[0].rejected, dict(pairs[0].meta)) == (" 4", " 5", {"domain": "sums"})
    assert dict(pairs[1].meta) == {}


def test_pairs_pass_through_and_generators_are_read() -> None:
    pair = gr.PreferencePair(**RECORD)
    assert gr.load_pairs(p for p in [pair, pair]) == [pair, pair]


def test_jsonl_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", f"{json.dumps(RECORD)}\n\n{json.dumps({**RECORD, 'chosen': ' four'})}\n")
    assert [p.chosen for p in gr.load_pairs(path)] == [" 4", " four"]
    assert [p.chosen for p in gr.load_pairs(str(path))] == [" 4", " four"]


def test_json_list(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", json.dumps([RECORD, RECORD]))
    assert gr.load_pairs(path) == [gr.PreferencePair(**RECORD)] * 2


def test_csv_with_templates_for_columns(tmp_path: Path) -> None:
    row = 'Law,Can pigs fly?,No,"Yes, they can; Only at night; Sometimes"\n'
    pair = gr.load_pairs(write(tmp_path / "t.csv", TRUTHFULQA_HEADER + row), TRUTHFULQA_COLUMNS)[0]
    assert pair.prompt == "Question: Can pigs fly?\nAnswer:"
    assert (pair.chosen, pair.rejected) == (" No", " Yes, they can")
    assert pair.meta["Category"] == "Law"


def test_columns_by_name_move_out_of_meta(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "q,good,bad,kind\nIs it?, yes, no,x\n")
    pair = gr.load_pairs(path, {"prompt": "q", "chosen": "good", "rejected": "bad"})[0]
    assert (pair.prompt, pair.chosen, pair.rejected, dict(pair.meta)) == ("Is it?", " yes", " no", {"kind": "x"})


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json"])
def test_byte_order_mark_is_not_part_of_the_data(tmp_path: Path, name: str) -> None:
    text = {
        "p.csv": "prompt,chosen,rejected\n2 + 2 =, 4, 5\n",
        "p.jsonl": json.dumps(RECORD) + "\n",
        "p.json": json.dumps([RECORD]),
    }[name]
    path = write(tmp_path / name, text, "utf-8-sig")
    assert path.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert gr.load_pairs(path) == [gr.PreferencePair(**RECORD)]


def test_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    pairs = gr.load_pairs(datasets.Dataset.from_list([{**RECORD, "split": "a"}, {**RECORD, "split": "b"}]))
    assert [p.meta["split"] for p in pairs] == ["a", "b"]
    assert pairs[0].prompt == RECORD["prompt"]


def test_conversational_records() -> None:
    prompt = [{"role": "user", "content": "2 + 2?"}]
    chosen = [{"role": "assistant", "content": "4"}]
    pair = gr.load_pairs([{"prompt": prompt, "chosen": chosen, "rejected": "5"}])[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, "5")


def test_limit_keeps_the_first_and_reads_no_further() -> None:
    rows: list[Any] = [RECORD, RECORD, "not a record"]
    assert len(gr.load_pairs(rows, limit=2)) == 2
    with pytest.raises(ValueError, match="row 3"):
        gr.load_pairs(rows)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], iter(())])
def test_no_records(empty: Any) -> None:
    with pytest.raises(ValueError, match="no records"):
        gr.load_pairs(empty)


def test_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no records in .*none\.jsonl"):
        gr.load_pairs(write(tmp_path / "none.jsonl", "\n"))


def test_missing_column_names_the_row_and_the_columns() -> None:
    with pytest.raises(KeyError) as error:
        gr.load_pairs([RECORD, {"question": "?", "chosen": "a", "rejected": "b"}])
    message = str(error.value)
    assert "row 2" in message and "question" in message and "prompt" in message


def test_missing_column_of_a_template_names_the_row_and_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "Question,Best\nWhy?,So\n")
    with pytest.raises(KeyError) as error:
        gr.load_pairs(path, TRUTHFULQA_COLUMNS)
    message = str(error.value)
    assert "row 1" in message and "Best Answer" in message and "Question" in message


def test_broken_jsonl_line_is_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", f'{json.dumps(RECORD)}\n\n{{"prompt": "x", \n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: not valid JSON"):
        gr.load_pairs(path)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_field(field: str, empty: str) -> None:
    with pytest.raises(ValueError, match=f"row 2: {field} is empty"):
        gr.load_pairs([RECORD, {**RECORD, field: empty}])


def test_empty_message() -> None:
    with pytest.raises(ValueError, match="chosen is empty"):
        gr.PreferencePair([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": " "}], "b")


def test_chosen_equal_to_rejected() -> None:
    with pytest.raises(ValueError, match="row 1: chosen equals rejected"):
        gr.load_pairs([{**RECORD, "rejected": " 4"}])


def test_text_prompt_with_messages_as_response() -> None:
    with pytest.raises(ValueError, match="text prompt needs text responses"):
        gr.PreferencePair("hi", [{"role": "assistant", "content": "a"}], "b")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        gr.load_pairs(tmp_path / "nothing_here.jsonl")


@pytest.mark.parametrize("name", ["p.txt", "p.parquet", "plain"])
def test_wrong_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"use \.jsonl, \.json or \.csv"):
        gr.load_pairs(write(tmp_path / name, "x"))


def test_json_that_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a dict"):
        gr.load_pairs(write(tmp_path / "p.json", json.dumps(RECORD)))


def test_one_record_without_a_list() -> None:
    with pytest.raises(ValueError, match="wrap the record in a list"):
        gr.load_pairs(RECORD)


def test_columns_for_unknown_fields() -> None:
    with pytest.raises(ValueError, match="answer"):
        gr.load_pairs([RECORD], {"answer": "chosen"})


def test_short_csv_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1: rejected is missing"):
        gr.load_pairs(write(tmp_path / "p.csv", "prompt,chosen,rejected\nx, a\n"))


# Was a bug: a missing cell becomes the word "None".
def test_short_csv_row_under_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "q,good,bad\nx,a\n")
    with pytest.raises(ValueError, match="row 1"):
        gr.load_pairs(path, {"prompt": "{q}", "chosen": " {good}", "rejected": " {bad}"})


# Was a bug: the message says "no column list index out of range".
def test_empty_semicolon_list_is_said_to_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", TRUTHFULQA_HEADER + "Law,Can pigs fly?,No,\n")
    with pytest.raises((KeyError, ValueError), match="row 1") as error:
        gr.load_pairs(path, TRUTHFULQA_COLUMNS)
    assert "index out of range" not in str(error.value)


# Was a bug: TypeError: 'int' object is not iterable, without the row.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_numbers_in_place_of_text_are_refused_with_their_row(field: str) -> None:
    with pytest.raises(ValueError, match="row 1"):
        gr.load_pairs([{**RECORD, field: 4}])


# -- bundled ----------------------------------------------------------------------------------------------------------

COUNTS = {
    "sentiment": {"build": 88, "choose": 24, "test": 104},
    "misconceptions": {"build": 72, "choose": 20, "test": 60},
}


@pytest.mark.parametrize("name", COUNTS)
def test_bundled_set(name: str) -> None:
    everything = gr.load_bundled(name)
    splits = {split: gr.load_bundled(name, split) for split in COUNTS[name]}
    assert {split: len(pairs) for split, pairs in splits.items()} == COUNTS[name]
    assert sorted(str(p.prompt) for p in everything) == sorted(str(p.prompt) for s in splits.values() for p in s)
    prompts = [p.prompt for p in everything]
    assert len(set(map(str, prompts))) == len(prompts)
    domains = {split: {p.meta["domain"] for p in pairs} for split, pairs in splits.items()}
    assert all(domains.values())
    assert not domains["build"] & domains["test"]
    assert not domains["build"] & domains["choose"]
    assert not domains["choose"] & domains["test"]


@pytest.mark.parametrize("name", COUNTS)
def test_bundled_responses_continue_the_prompt(name: str) -> None:
    for pair in gr.load_bundled(name) + gr.load_bundled(name, "test", wording="other"):
        assert isinstance(pair.prompt, str) and pair.prompt == pair.prompt.rstrip()
        for response in (pair.chosen, pair.rejected):
            assert isinstance(response, str) and response.startswith(" ") and not response.startswith("  ")


def test_sentiment_words_stand_in_their_prompts() -> None:
    for pair in gr.load_bundled("sentiment"):
        assert pair.meta["good"] in pair.prompt and pair.meta["bad"] in pair.prompt
        assert pair.meta["good"] != pair.meta["bad"]


def test_unknown_set_or_split() -> None:
    with pytest.raises(ValueError, match="jokes"):
        gr.load_bundled("jokes")
    with pytest.raises(ValueError, match="train"):
        gr.load_bundled("sentiment", "train")


@pytest.mark.parametrize("name", COUNTS)
def test_other_wordings_share_few_words_with_the_own_ones(name: str) -> None:
    own, other = gr.load_bundled(name, "test"), gr.load_bundled(name, "test", wording="other")
    assert len(other) == COUNTS[name]["test"] and [p.prompt for p in own] == [p.prompt for p in other]
    shares = []
    for a, b in zip(own, other, strict=True):
        words = [
            {w for w in re.findall(r"[a-z0-9]+", f"{p.chosen} {p.rejected}".lower()) if len(w) > 3} for p in (a, b)
        ]
        shares.append(len(words[0] & words[1]) / max(1, len(words[1])))
    assert sum(shares) / len(shares) < 0.1 and max(shares) < 0.5
    assert len({p.chosen for p in other}) > 0.8 * len(other)


@pytest.mark.usefixtures("unchecked")
def test_only_test_records_have_other_wordings() -> None:
    for split in (None, "build"):
        with pytest.raises(ValueError, match="only the test records"):
            gr.load_bundled("sentiment", split, wording="other")
    with pytest.raises(ValueError, match="wording='third'"):
        gr.load_bundled("sentiment", "test", wording="third")  # type: ignore[arg-type]


# -- attribution as data ----------------------------------------------------------------------------------------------


def test_relative_gap() -> None:
    assert attribution([1.0, 2.0], gap=-0.5, ends=(3.0, 1.0)).relative_gap == pytest.approx(0.25)
    assert attribution([1.0, 2.0]).relative_gap is None


def test_attribution_as_text_names_the_largest_scores() -> None:
    text = str(attribution([0.1, -3.0, 0.2, 2.0, 0.3, 0.4, 0.05]))
    assert text.index("t1") < text.index("t3") and "-3.00" in text
    assert "t6" not in text and "gap none" in text


# Was a bug: NaN sorts first.
def test_attribution_as_text_is_not_filled_with_skipped_tokens() -> None:
    text = str(attribution([float("nan")] * 5 + [2.0, -1.0]))
    assert "t5" in text and "t6" in text


def test_records_are_frozen() -> None:
    pair: Any = gr.PreferencePair(**RECORD)
    with pytest.raises(AttributeError):
        pair.prompt = "other"
    assert isinstance(pair.meta, Mapping)
