"""Faults that users of other libraries reported, tried on this package; the report is named at each test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import grains_tl as gr
from grains_tl._util.errors import RecordError
from grains_tl.attribution.words import spaced
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.tokens.text import decode_after
from tests.conftest import tiny_model, tiny_tokenizer
from tests.helpers.templates import TEMPLATES, TokenizerOnly, bytes_tokenizer
from tests.helpers.tokenizers import sentencepiece_like, starting_with, wordpiece_like

USER = {"role": "user", "content": "Is tea hot?"}
QWEN35 = (  # the generation prompt opens the thoughts, and an answer without thoughts gets an empty block
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% set t = '' %}{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<think>\n' + t + '\n</think>\n\n' + c }}{% else %}"
    "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def cut(template: str, prompt: Any, chosen: Any, rejected: Any) -> tuple[str, str, str]:
    tokenizer = bytes_tokenizer(template)
    t = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [gr.PreferencePair(prompt, chosen, rejected)])[0]
    return tuple(tokenizer.decode(list(ids)) for ids in (t.prompt, t.chosen, t.rejected))  # type: ignore[return-value]


# huggingface/trl#5213, #6361: Qwen 3.5
@pytest.mark.parametrize(
    "answer", ["Yes.", "It is brewed.\n</think>\n\nYes.", "<think>\nIt is brewed.\n</think>\n\nYes."]
)
def test_a_generation_prompt_that_opens_thoughts(answer: str) -> None:
    prompt, chosen, _ = cut(QWEN35, [USER], answer, "No.")
    whole = bytes_tokenizer(QWEN35).apply_chat_template([USER, says(answer)], tokenize=False)
    assert prompt + chosen + "<|im_end|>\n" == whole and prompt.endswith("assistant\n<think>\n")


# huggingface/trl#2385: the rejected answer was given the user's role
@pytest.mark.parametrize("template", ["chatml", "plain", "gemma"])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_an_answer_with_another_role(template: str, role: str) -> None:
    with pytest.raises(RecordError, match=f"record 1: .*rejected.*{role}"):
        cut(TEMPLATES[template], [USER], [says("Yes.")], [{"role": role, "content": "No."}])


# huggingface/transformers#36404, #40687, #35433: last words that stand earlier too, are empty, or end with a space
@pytest.mark.parametrize("template", ["chatml", "gemma", "llama2", "reminds"])
@pytest.mark.parametrize("last", ["ok ", "ok", "", "Is tea hot?", "\n"])
def test_continuing_words_that_are_hard_to_find(template: str, last: str) -> None:
    prompt = [USER, says("ok"), USER, says(last)]
    tokenizer = bytes_tokenizer(TEMPLATES[template])
    wanted = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    found = cut(TEMPLATES[template], prompt, "then", "not")
    whole = tokenizer.apply_chat_template([*prompt[:-1], says(last + "then")], tokenize=False)
    assert found[0] == wanted and found[1].endswith("then") and whole.startswith(found[0] + found[1])


# axolotl-ai-cloud/axolotl#2089: the same words in every turn
def test_the_same_words_in_every_turn() -> None:
    turns = [{"role": "user", "content": "MASKED"}, says("NOT MASKED")] * 3 + [{"role": "user", "content": "MASKED"}]
    tokenizer = bytes_tokenizer(TEMPLATES["llama2"])
    t = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [gr.PreferencePair(turns, "NOT MASKED", "MASKED")])[0]
    kept = "".join(tokenizer.decode([i]) if keep else "|" for i, keep in zip(t.prompt, t.content, strict=True))
    assert [p for p in kept.split("|") if p] == [m["content"] for m in turns]


# EleutherAI/lm-evaluation-harness#3347, NVIDIA-NeMo/RL#855, evalplus/evalplus#207: BOS twice
def test_bos_once_where_the_template_writes_it() -> None:
    tokenizer = starting_with("<bos>", bos="<bos>")
    tokenizer.chat_template = "{{ '<bos> ' }}{% for m in messages %}{{ m.content + ' <eos> ' }}{% endfor %}"
    model = TokenizerOnly(tokenizer)
    chat = [{"role": "user", "content": "film was good"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert prompt_ids(model, chat).count(1) == prompt_ids(model, rendered).count(1) == 1


# unslothai/unsloth#10312: a template without BOS on a tokenizer that adds one gives what apply_chat_template gives
def test_no_bos_where_the_template_writes_none() -> None:
    tokenizer = starting_with("<bos>", bos="<bos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' <eos> ' }}{% endfor %}"
    chat = [{"role": "user", "content": "film was good"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(TokenizerOnly(tokenizer), chat) == wanted


# modelscope/ms-swift#10125: tools of different shape come out of arrow with each other's keys, as null
# THUDM/slime#68: tools in a parquet file read with pandas are arrays
@pytest.mark.parametrize("form", ["arrow", "arrays", "json"])
def test_tools_reach_the_template_as_they_were(form: str) -> None:
    datasets = pytest.importorskip("datasets")
    tools = [
        {"function": {"name": "a", "parameters": {"city": {"type": "string"}}}},
        {"function": {"name": "b", "parameters": {"day": {"type": "integer"}}}},
    ]
    row: dict[str, Any] = {"prompt": [USER], "chosen": [says("Yes.")], "rejected": [says("No.")], "tools": tools}
    source: Any = [row]
    if form == "arrow":
        source = datasets.Dataset.from_list([row])
    elif form == "arrays":
        source = [{**row, "tools": np.array(tools, dtype=object)}]
    elif form == "json":
        source = [{**row, "tools": json.dumps(tools)}]
    assert gr.load_pairs(source)[0].tools == tools


# opendatahub-io/pipelines-components#238: every message of a column as a JSON text
def test_messages_that_are_each_a_json_text() -> None:
    row = {"prompt": [json.dumps(USER)], "chosen": [json.dumps(says("Yes."))], "rejected": [json.dumps(says("No."))]}
    pair = gr.load_pairs([row])[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [says("Yes.")], [says("No.")])


# castform-ai/benchmax#31: null in place of no calls
@pytest.mark.parametrize("nothing", [None, []])
def test_no_tool_calls(nothing: Any) -> None:
    assert cut(TEMPLATES["qwen3"], [USER], [says("Yes.", tool_calls=nothing)], "No.")[1].endswith("Yes.")


# Lightning-AI/litgpt#2326, huggingface/transformers#22710, #28776: a space is lost where tokens are decoded by themselves
def test_token_by_token_is_the_whole_text() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("the film was great and cold")["input_ids"]
    pieces = [decode_after(tokenizer, ids[:n], [ids[n]]) for n in range(len(ids))]
    assert "".join(pieces) == "the film was great and cold"


# unslothai/unsloth#334, PromtEngineer/localGPT#720: roles that do not alternate, told without the record
# the prompt in every choice
def test_choices_that_hold_the_prompt_again() -> None:
    with pytest.raises(ValueError, match="all choices begin with the whole prompt"):
        gr.MultipleChoice("Is tea hot?", ("Is tea hot? Yes", "Is tea hot? No"), (True, False))


# huggingface/trl#2131: conversations whose common part ends with the assistant
def test_the_common_part_ends_with_the_assistant() -> None:
    rows = [
        {
            side: [USER, says("Hm."), {"role": "user", "content": said}, says("So.")]
            for side, said in (("chosen", "a"), ("rejected", "b"))
        }
    ]
    pair = gr.load_pairs(rows)[0]
    assert pair.prompt == [USER] and len(pair.chosen) == len(pair.rejected) == 3


def test_ultrafeedback_on_a_template_that_wants_alternating_roles() -> None:
    rows = [
        {
            "prompt": "Tea?",
            "chosen": [{"role": "user", "content": "Tea?"}, says("Yes.")],
            "rejected": [{"role": "user", "content": "Tea?"}, says("No.")],
        },
        {"prompt": [USER], "chosen": [says("a"), says("b")], "rejected": "No."},
    ]
    model = TokenizerOnly(bytes_tokenizer(TEMPLATES["gemma"]))
    assert len(gr.tokens.tokenize_pairs(model, rows[:1])) == 1
    with pytest.raises(RecordError, match="record 2: .*roles must alternate"):
        gr.tokens.tokenize_pairs(model, rows)


# huggingface/datasets#2795, Lightning-AI/litgpt#1759, huggingface/transformers#43459: no text, or half a character
@pytest.mark.parametrize("bad", [None, float("nan"), 3, "a \ud800 b"])
@pytest.mark.usefixtures("unchecked")
def test_cells_that_stop_a_tokenizer_are_told_with_their_row(bad: Any) -> None:
    rows = [{"prompt": "Tea is", "chosen": " hot", "rejected": " cold"}] * 2
    with pytest.raises(RecordError, match="row 2: prompt "):
        gr.load_pairs([rows[0], {**rows[1], "prompt": bad}])


# TransformerLensOrg/TransformerLens#1418, #369: BOS where the tokenizer puts none, or twice
@pytest.mark.parametrize("front", [(), ("<bos>",)])
def test_ids_are_those_of_transformers(front: tuple[str, ...]) -> None:
    tokenizer = starting_with(*front, bos="<bos>")
    t = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [gr.PreferencePair("film was", " good", " bad")])[0]
    assert [*t.prompt, *t.chosen] == tokenizer("film was good")["input_ids"]


# the same fault in tables: words of a prompt run together
@pytest.mark.parametrize("make", [sentencepiece_like, wordpiece_like, tiny_tokenizer])
def test_texts_of_groups_and_spans_keep_their_spaces(make: Any) -> None:
    model = tiny_model(tokenizer=make())
    a = gr.attribute(model, gr.PreferencePair("the film was good . the soup was great", " and warm", " and cold"))
    texts = gr.attribution.group(a, by=["film was good"]).texts
    assert next(t for t in texts if "film" in t).strip() == "film was good"
    sentences = gr.attribution.group(a, by="sentence").texts
    assert any("soup was great" in t for t in sentences)


def test_joined_token_texts_are_the_prompt() -> None:
    for make in (sentencepiece_like, bytes_tokenizer):
        pair = gr.PreferencePair("the film was good", " and warm", " and cold")
        t = gr.tokens.tokenize_pairs(TokenizerOnly(make()), [pair])[0]
        assert "".join(spaced(t.strings, t.starts_word)).removeprefix("<bos>").strip() == pair.prompt


# huggingface/trl#2385: the system prompt in a column of its own; trl's own column for template options
@pytest.mark.parametrize(
    "column",
    [
        {"system": "Be brief."},
        {"system": [{"role": "system", "content": "Be brief."}]},
        {"system_prompt": "Be brief."},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_a_row_holds_for_the_template_is_not_left_out(column: dict[str, Any]) -> None:
    row = {"prompt": [USER], "chosen": [says("Yes.")], "rejected": [says("No.")]}
    with pytest.raises(RecordError, match=f"row 2: .*{next(iter(column))}") as caught:
        gr.load_pairs([row, {**row, **column}])
    assert caught.value.number == 2
    assert gr.load_pairs([{**row, **dict.fromkeys(column)}])[0].prompt == [USER]  # an empty cell says nothing
    text = {"prompt": "Is tea hot?", "chosen": " Yes.", "rejected": " No.", **column}
    assert gr.load_pairs([text])[0].meta == column  # no template there
    if "system" in next(iter(column)):  # the same words again, as some data sets have them
        prompt = [{"role": "system", "content": "Be brief."}, USER]
        assert gr.load_pairs([{**row, **column, "prompt": prompt}])[0].prompt == prompt


# huggingface/trl#6433: chosen with its thoughts, rejected without, after a generation prompt that opens them
def test_thoughts_in_one_response_only_are_not_cut() -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
    )
    with pytest.raises(RecordError, match="record 1: .*thoughts"):
        cut(template, [USER], [says("<think>Hm.</think>Yes.")], [says("No.")])
    found = cut(template, [USER], [says("<think>Hm.</think>Yes.")], [says("<think>Ah.</think>No.")])
    assert found == ("<user>Is tea hot?<end><assistant><think>", "Hm.</think>Yes.", "Ah.</think>No.")


# huggingface/trl#2054: a template that ends the prompt with a space; axolotl#2089: the same words in every turn
def test_a_prompt_that_ends_with_a_space() -> None:
    template = (
        "{% for m in messages %}{{ (m.content | trim + '</s>') if m.role == 'assistant' "
        "else (' [INST] ' + m.content | trim + ' [/INST] ') }}{% endfor %}"
    )
    before = [USER, says("Yes."), USER, says("Yes."), USER]
    turn = " [INST] Is tea hot? [/INST] "
    assert cut(template, before, [says("Yes.")], [says("No.")]) == (
        f"{turn}Yes.</s>{turn}Yes.</s>{turn}", "Yes.", "No."
    )  # fmt: skip


# huggingface/trl#1930: a template that opens every conversation without a system message with its own
def test_a_system_prompt_of_the_templates_own_stands_once() -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<system>Help.<end>' }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    found = cut(template, [USER], [says("Yes.")], [says("No.")])
    assert found == ("<system>Help.<end><user>Is tea hot?<end><assistant>", "Yes.", "No.")
