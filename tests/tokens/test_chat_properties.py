"""Random templates and random records: no silent difference from plain ``apply_chat_template`` and tokenizer calls.

``GRAINS_TL_EXAMPLES=2000`` in the environment makes the run longer.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import grains_tl as gr
from grains_tl._util.errors import RecordError
from grains_tl.tokens.prompts import prompt_ids
from tests.conftest import WORDS, tiny_tokenizer
from tests.helpers.templates import TEMPLATES, TokenizerOnly, bytes_tokenizer
from tests.helpers.tokenizers import sentencepiece_like, starting_with, wordpiece_like

EXAMPLES = settings(
    max_examples=int(os.environ.get("GRAINS_TL_EXAMPLES", "200")),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# -- templates ------------------------------------------------------------------------------------------------------------

HEADERS = [
    "'<|im_start|>' + m.role + '\n'",
    "('ASSISTANT: ' if m.role == 'assistant' else 'USER: ')",
    "'[' + m.role + '] '",
    "('' if m.role == 'assistant' else '[INST] ')",
    "'<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>'",
    "'\n\n' + m.role | title + ':'",
]
CONTENTS = [
    "c",
    "c | trim",
    "c | replace('\n', ' ')",
    "c.strip() + ' '",
    "(' ' + c)",
    "c | tojson",
    "c.split('</think>')[-1]",
    "c | upper",
]
CLOSINGS = [
    "'<|im_end|>\n'",
    "'\n'",
    "''",
    "(' [/INST]' if m.role != 'assistant' else ' </s>')",
    "(eos_token if loop.last and m.role == 'assistant' else '\n')",
    "(eos_token if loop.last else '\n')",
]
THOUGHTS = [
    "",
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}",
    "{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{% endif %}",
    "{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{% endif %}",
]
CALLS = ["", "{{ '\n<tool_call>' + m.tool_calls | tojson + '</tool_call>' if m.tool_calls }}"]
OPENINGS = [
    "",
    "{{ 'You are helpful.\n' if messages[0].role != 'system' }}",
    "{{ bos_token }}",
    "{{ 'TOOLS ' + tools | tojson if tools }}",
]
RULES = [
    "",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}",
]


@st.composite
def templates(draw: Any) -> str:
    """One of the families, or a template put together from their parts."""
    if draw(st.booleans()):
        return TEMPLATES[draw(st.sampled_from(sorted(TEMPLATES)))]
    header, content, closing = (draw(st.sampled_from(parts)) for parts in (HEADERS, CONTENTS, CLOSINGS))
    thoughts, calls, opening, rule = (draw(st.sampled_from(parts)) for parts in (THOUGHTS, CALLS, OPENINGS, RULES))
    ask = header.replace("m.role", "'assistant'")
    if thoughts == THOUGHTS[2]:
        ask += " + '<think>\n\n</think>\n'"  # as templates do that show empty thoughts in front of the last answer
    ends = "{% if add_generation_prompt %}{{ " + ask + " }}{% endif %}" if draw(st.booleans()) else ""
    body = (
        "{% set c = m.content or '' %}{{ "
        + header
        + " }}"
        + thoughts
        + "{{ "
        + content
        + " }}"
        + calls
        + "{{ "
        + closing
        + " }}"
    )
    return rule + opening + "{% for m in messages %}" + body + "{% endfor %}" + ends


def pieces_tokenizer() -> Any:
    """Bytes with some merges, so that tokens may lie across the borders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [
        (":", "Ġ"),
        ("Ċ", "Ċ"),
        ("a", "s"),
        ("as", "s"),
        ("e", "s"),
        ("Ġ", "a"),
        (">", "Ċ"),
        ("t", "o"),
        ("]", "Ġ"),
    ]
    vocab = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(vocab)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


# -- records --------------------------------------------------------------------------------------------------------------

TRICKY = [
    "assistant",
    "user",
    "final",
    "im",
    "think",
    "</think>",
    "<think>a</think>b",
    "s",
    "INST",
    "[",
    ":",
    '"',
    "\\",
    "{x}",
    "{{ 1 }}",
    "a\nb",
    "é",
    "日本",
    "😀",
    "<|im_end|>",
    "Yes.",
    "4",
    "as",
    " a ",
    "x  y",
]
words = st.one_of(
    st.sampled_from(TRICKY),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
)
contents = st.builds(
    lambda a, b, pad: pad + a + b, words, st.one_of(st.just(""), words), st.sampled_from(["", "", " ", "\n"])
).filter(str.strip)
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"place": "Oslo"}}}]


@st.composite
def assistants(draw: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": draw(contents)}
    extra = draw(st.sampled_from(["", "", "", "thoughts", "calls", "only calls"]))
    if extra == "thoughts":
        message["reasoning_content"] = draw(contents)
    if "calls" in extra:
        message |= {"tool_calls": CALL, **({"content": None} if extra == "only calls" else {})}
    return message


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    prompt: list[dict[str, Any]] = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        prompt += [{"role": "user", "content": draw(contents)}, draw(assistants())]
    prompt.append({"role": "user", "content": draw(contents)})
    if draw(st.sampled_from([False, False, True])):
        prompt.append({"role": "assistant", "content": draw(contents)})
    row: dict[str, Any] = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        if draw(st.booleans()):
            row[name] = draw(contents)
        else:
            row[name] = [draw(assistants())]
            if draw(st.sampled_from([False, False, True])):
                row[name] += [{"role": "user", "content": draw(contents)}, draw(assistants())]
    if draw(st.sampled_from([False, False, True])):
        row["tools"] = [{"type": "function", "function": {"name": "look"}}]
    return row


def fitting(template: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row without what the template would refuse or leave out, so that there are ids to compare."""
    shown = {name for name in ("tool_calls", "reasoning_content") if f".{name}" in template or f"'{name}'" in template}
    if THOUGHTS[2] in template:
        shown.discard("reasoning_content")  # its generation prompt has empty thoughts
    quiet = "system" in template and ("no system" in template or "not supported" in template)

    def kept(message: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in message.items() if k in ("role", "content") or k in shown}
        if own["content"] is None and ("tool_calls" not in own or template in TEMPLATES.values()):
            own["content"] = "done"
        return own

    found = {k: [kept(m) for m in v] if k != "tools" and isinstance(v, list) else v for k, v in row.items()}
    if " tools" not in template:
        found.pop("tools", None)
    found["prompt"] = [m for m in found["prompt"] if not (quiet and m["role"] == "system")]
    if "too long" in template:
        found["prompt"] = found["prompt"][-2 if found["prompt"][-1]["role"] == "assistant" else -1 :]
        for name in ("chosen", "rejected"):
            found[name] = found[name] if isinstance(found[name], str) else found[name][:1]
    going_on = found["prompt"][-1]["role"] == "assistant"
    for name in ("chosen", "rejected"):
        if isinstance(found[name], list) and going_on:  # thoughts cannot come after words
            found[name] = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in found[name]]
    first = {k: found[k] if isinstance(found[k], str) else found[k][0]["content"] for k in ("chosen", "rejected")}
    if first["chosen"] == first["rejected"]:
        other = f"{first['rejected']}!"
        own = found["rejected"]
        found["rejected"] = other if isinstance(own, str) else [{**own[0], "content": other}, *own[1:]]
    return found


@st.composite
def cases(draw: Any) -> tuple[str, dict[str, Any]]:
    """A template and a row, which in four of five cases has nothing that the template cannot show."""
    template, row = draw(templates()), draw(rows())
    return template, fitting(template, row) if draw(st.sampled_from([True] * 4 + [False])) else row


FORMS: dict[str, Any] = {
    "as it is": lambda row: row,
    "serialised": lambda row: {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()},
    "printed": lambda row: {k: repr(v) if isinstance(v, list) and k != "tools" else v for k, v in row.items()},
    "arrays": lambda row: {
        k: np.array([*v, None], dtype=object)[:-1] if isinstance(v, list) else v for k, v in row.items()
    },
    "tuples": lambda row: {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()},
}


def joined(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The conversation with one response, by hand: a prompt's last words from the assistant are continued."""
    answer = [{"role": "assistant", "content": row[name]}] if isinstance(row[name], str) else list(row[name])
    prompt = list(row["prompt"])
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *answer]
    last = prompt.pop()
    return [*prompt, {**last, **answer[0], "content": last["content"] + (answer[0]["content"] or "")}, *answer[1:]]


@EXAMPLES
@given(case=cases(), form=st.sampled_from(sorted(FORMS)), merging=st.booleans())
def test_conversations(case: tuple[str, dict[str, Any]], form: str, merging: bool) -> None:
    template, row = case
    tokenizer = made("pieces" if merging else "bytes")
    tokenizer.chat_template = template
    model = TokenizerOnly(tokenizer)
    try:
        pair = gr.load_pairs([FORMS[form](row)])[0]
        found = gr.tokens.tokenize_pairs(model, [pair])[0]
    except RecordError as error:  # said aloud
        assert error.number == 1 and str(error).startswith(("record 1: ", "row 1: "))
        event("refused")
        return
    event("tokenized")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    going_on = row["prompt"][-1]["role"] == "assistant"
    end = {"continue_final_message": True} if going_on else {"add_generation_prompt": True}
    plain = tokenizer.apply_chat_template(row["prompt"], return_dict=False, **end, **tools)
    assert [*found.prompt, *plain[len(found.prompt) :]] == plain
    assert len(plain) - len(found.prompt) == found.moved_border <= (6 if merging else 0)
    if not tools:
        assert prompt_ids(model, row["prompt"]) == plain
    for name, ids in (("chosen", found.chosen), ("rejected", found.rejected)):
        messages = joined(row, name)
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **tools)
        text = tokenizer.decode([*found.prompt, *ids])
        assert whole.startswith(text)
        assert [*found.prompt, *ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
        # behind it comes only what the template writes after any words
        closing, last = whole[len(text) :], messages[-1]
        if not last.get("tool_calls"):
            other = tokenizer.apply_chat_template([*messages[:-1], {**last, "content": "Q7Z"}], tokenize=False, **tools)
            assert other.endswith("Q7Z" + closing) or other.endswith("Q7Z " + closing) or '"' in closing
        else:
            assert "Oslo" in text.rsplit("place", 1)[-1]
    # every message's words are content, as they are rendered
    kept = tokenizer.decode([t for t, keep in zip(found.prompt, found.content, strict=True) if keep])
    for message in row["prompt"]:
        said = (message["content"] or "").split("</think>")[-1].split()
        if said and found.moved_border == 0 and "tojson" not in template and "<" not in said[0]:
            assert said[0] in kept, (said, kept)


# -- plain texts ----------------------------------------------------------------------------------------------------------

MAKERS = {
    "words": tiny_tokenizer,
    "sentencepiece": sentencepiece_like,
    "wordpiece": wordpiece_like,
    "bytes": bytes_tokenizer,
    "pieces": pieces_tokenizer,
    "bos": lambda: starting_with("<bos>", bos="<bos>"),
    "two in front": lambda: starting_with("<eos>", "<bos>"),
    "not declared": lambda: starting_with("<bos>"),
    "closed": lambda: starting_with("<bos>", bos="<bos>", end="<eos>"),
}
made = cache(lambda name: MAKERS[name]())
sentences = st.lists(st.sampled_from([*WORDS[3:30], "<eos>", "<bos>", "xyz", "é"]), min_size=1, max_size=6).map(
    " ".join
)


@EXAMPLES
@given(
    maker=st.sampled_from(sorted(MAKERS)),
    prompt=sentences,
    chosen=sentences,
    rejected=sentences,
    space=st.sampled_from(["", " ", "  ", "\n"]),
)
def test_texts(maker: str, prompt: str, chosen: str, rejected: str, space: str) -> None:
    tokenizer = made(maker)
    model = TokenizerOnly(tokenizer)
    back = [2] if maker == "closed" else []
    try:
        found = gr.tokens.tokenize_pairs(model, [gr.PreferencePair(prompt, space + chosen, space + rejected)])[0]
    except ValueError:
        event("refused")
        return
    for response, ids in ((chosen, found.chosen), (rejected, found.rejected)):
        plain = tokenizer(prompt + space + response)["input_ids"]
        # a BOS that the text itself begins with is not put there twice
        assert [*found.prompt, *ids, *back] in (plain, plain[1:] if prompt.startswith("<bos>") else plain)
    assert found.strings == tuple(tokenizer.decode([i]) for i in found.prompt)
    slow = [True]
    for before, this in zip(found.prompt, found.prompt[1:], strict=False):
        n = len(tokenizer.decode([before]))
        slow.append(tokenizer.decode([before, this])[n : n + 1].isspace())
    assert found.starts_word == tuple(slow)
