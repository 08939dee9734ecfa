"""Conversations as the chat template renders them: the package's ids against plain ``apply_chat_template``."""

from __future__ import annotations

import re
from typing import Any

import pytest

import grains_tl as gr
from grains_tl._util.errors import RecordError
from grains_tl.inference.choices import tokenize_choices
from grains_tl.tokens.prompts import prompt_ids
from tests.helpers.templates import TEMPLATES, TokenizerOnly, bytes_tokenizer
from tests.helpers.tokenizers import starting_with


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def says(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}]


def texts(template: str, prompt: Any, chosen: Any, rejected: Any, **more: Any) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as the package cuts them, decoded."""
    tokenizer = bytes_tokenizer(TEMPLATES[template])
    pair = gr.PreferencePair(prompt, chosen, rejected, **more)
    t = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [pair])[0]
    return tuple(tokenizer.decode(list(ids)) for ids in (t.prompt, t.chosen, t.rejected))  # type: ignore[return-value]


def content(template: str, prompt: Any, **more: Any) -> str:
    """The prompt's content tokens, decoded; a bar for what lies between."""
    tokenizer = bytes_tokenizer(TEMPLATES[template])
    pair = gr.PreferencePair(prompt, "a", "b", **more)
    t = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [pair])[0]
    runs: list[list[int]] = [[]]
    for token, keep in zip(t.prompt, t.content, strict=True):
        if keep:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer.decode(run) for run in runs if run)


# -- where a response begins and ends (was a bug: its words were searched in the rendered text) -------------------------


@pytest.mark.parametrize(
    ("template", "chosen", "rejected", "expected"),
    [
        ("qwen3", says("4", reasoning_content="2 and 2, not 4"), "5", "<think>\n2 and 2, not 4\n</think>\n\n4"),
        ("qwen3", "hi", "bye", "<think>\n\n</think>\n\nhi"),
        ("qwen3", "in", "out", "<think>\n\n</think>\n\nin"),
        ("qwen3", "<think>4?</think>\n4", "5", "<think>\n4?\n</think>\n\n4"),
        ("channels", "final", "draft", "<|channel|>final<|message|>final"),
        ("channels", "n", "y", "<|channel|>final<|message|>n"),
        ("chatml", "assistant", "user", "assistant"),
        ("chatml", "im_end", "im", "im_end"),
        ("plain", "assistant", "a", "[assistant] assistant"),
        ("gemma", "model ", "turn", "model"),
        ("llama2", "s", "INST", " s"),
        ("one_line", "a\nb", "c", "a b"),
        ("one_line", '"', "'", '"'),
        ("reminds", "Who?", "You", "Who?"),
    ],
)
def test_the_response_ends_with_its_own_words(template: str, chosen: Any, rejected: str, expected: str) -> None:
    chosen = chosen if isinstance(chosen, str) else [chosen]
    prompt, found, _ = texts(template, [user("Who?")], chosen, rejected)
    assert found == expected
    tokenizer = bytes_tokenizer(TEMPLATES[template])
    assert prompt == tokenizer.apply_chat_template([user("Who?")], tokenize=False, add_generation_prompt=True)


def test_several_messages_as_a_response() -> None:
    turns = [says("Yes"), user("And yours?")]
    _, chosen, rejected = texts(
        "chatml", [user("Say my role.")], [*turns, says("assistant")], [*turns, says("captain")]
    )
    assert chosen.endswith("<|im_start|>assistant\nassistant") and rejected.endswith("<|im_start|>assistant\ncaptain")


@pytest.mark.parametrize("response", ["xQzMark", "0x", "xQzMark0x"])
def test_words_that_look_like_our_own_mark(response: str) -> None:
    assert texts("chatml", [user(response)], response, "no")[1] == response
    assert content("chatml", [user(response), says(response), user("so")]) == f"{response}|{response}|so"


def test_the_generation_prompt_opens_thoughts() -> None:
    """A response with thoughts goes on with them; one without them stands at another place, which is refused."""
    thoughts = [[says(w, reasoning_content=f"So {w}.")] for w in ("4", "5")]
    assert texts("opens_thoughts", [user("2 + 2?")], *thoughts) == (
        "<|user|>2 + 2?<|assistant|><think>\n",
        "So 4.</think>4",
        "So 5.</think>5",
    )
    with pytest.raises(RecordError, match="record 1: .*differently.*<think>.*reasoning_content"):
        texts("opens_thoughts", [user("2 + 2?")], "4", "5")


# -- more than words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["Let me look.", "", None])
def test_tool_calls_are_scored(words: str | None) -> None:
    messages = [user("Weather in Oslo?"), says(words, tool_calls=CALL)]
    for template, end in (("qwen3", "<|im_end|>\n"), ("channels", "")):
        tokenizer = bytes_tokenizer(TEMPLATES[template])
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt, chosen, _ = texts(template, messages[:1], messages[1:], "No.")
        assert prompt + chosen + end == whole and "Oslo" in chosen


def test_tools_reach_the_template() -> None:
    row = {"prompt": [user("Weather?")], "chosen": [says("Fine.")], "rejected": [says("No.")], "tools": TOOLS}
    pair = gr.load_pairs([row])[0]
    tokenizer = bytes_tokenizer(TEMPLATES["qwen3"])
    ids = gr.tokens.tokenize_pairs(TokenizerOnly(tokenizer), [pair])[0].prompt
    assert list(ids) == tokenizer.apply_chat_template(
        [user("Weather?")], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert "tools" not in pair.meta


def test_tool_messages_in_the_prompt() -> None:
    prompt = [user("Weather?"), says(None, tool_calls=CALL), {"role": "tool", "content": "rain"}]
    tokenizer = bytes_tokenizer(TEMPLATES["qwen3"])
    wanted = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert texts("qwen3", prompt, "Rain.", "Sun.")[0] == wanted
    assert content("qwen3", prompt) == "Weather?|weather|Oslo|rain"


@pytest.mark.parametrize(
    ("prompt", "chosen", "more", "message"),
    [
        ([user("Hi")], [says("Look.", tool_calls=CALL)], {}, "leaves out the tool_calls of chosen"),
        (
            [user("Hi"), says("Look.", tool_calls=CALL), {"role": "tool", "content": "rain"}],
            "a",
            {},
            "tool_calls of the prompt",
        ),
        ([user("Hi")], [says("4", reasoning_content="So.")], {}, "leaves out the reasoning_content of chosen"),
        ([user("Hi")], "a", {"tools": TOOLS}, "leaves out the record's tools"),
        ([user("Hi"), says("Look.", tool_calls=CALL)], "a", {}, "ends with the assistant's tool call"),
    ],
)
def test_what_the_template_leaves_out_is_refused(prompt: Any, chosen: Any, more: Any, message: str) -> None:
    with pytest.raises(RecordError, match=f"^record 1: .*{message}"):
        texts("chatml", prompt, chosen, "other", **more)


def test_tools_with_a_text_prompt() -> None:
    with pytest.raises(ValueError, match="tools are given with a text prompt"):
        gr.PreferencePair("Weather in Oslo?", " rain", " sun", tools=TOOLS)


# -- a template that refuses --------------------------------------------------------------------------------------------


def test_every_path_names_the_record_and_quotes_the_template(bridge: Any) -> None:
    model = TokenizerOnly(bytes_tokenizer(TEMPLATES["gemma"]))
    good = gr.PreferencePair([user("Hi")], "Hello", "Bye")
    chat = [system("Be short."), user("Hi")]
    with pytest.raises(RecordError, match=r"^record 2: .*System role not supported") as error:
        gr.tokens.tokenize_pairs(model, [good, gr.PreferencePair(chat, "Hello", "Bye")])
    assert error.value.number == 2
    with pytest.raises(RecordError, match=r"^record 1: .*System role not supported"):
        gr.tokens.tokenize_pairs(model, gr.baselines.with_system_prompt([good], "Be kind."))
    with pytest.raises(RecordError, match=r"^prompt 1: .*System role not supported"):
        gr.generate(model, [chat])
    with pytest.raises(RecordError, match=r"^question 1: .*roles must alternate"):
        gr.inference.score_choices(model, [gr.MultipleChoice([user("a"), user("b")], ("a", "b"), (True, False))])
    with pytest.raises(RecordError, match=r"^record 1: chosen begins with role 'user'"):
        gr.tokens.tokenize_pairs(model, [gr.PreferencePair([user("Hi")], [user("Hello")], "Bye")])


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].nothing.at_all }}", "{{ messages[0].content + 1 }}", "{{ messages[5].content }}{{ 1/0 }}"],
)
def test_errors_inside_a_template_are_errors_of_the_record(template: str) -> None:
    model = TokenizerOnly(bytes_tokenizer(template))
    with pytest.raises(RecordError, match="record 1: the chat template refuses"):
        gr.tokens.tokenize_pairs(model, [gr.PreferencePair([user("Hi")], "Hello", "Bye")])


def test_a_message_without_a_role() -> None:
    with pytest.raises(ValueError, match="role"):
        gr.PreferencePair([{"content": "Hi"}], "Hello", "Bye")


# -- a prompt that ends with the assistant's words ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", ["chatml", "plain", "gemma", "llama2", "qwen3", "channels", "opens_thoughts", "reminds"]
)
@pytest.mark.parametrize("words", ["My favourite colour is", "My favourite colour is ", "assistant"])
def test_the_assistants_turn_is_continued(template: str, words: str) -> None:
    prompt = [user("Name one colour."), says(words)]
    tokenizer = bytes_tokenizer(TEMPLATES[template])
    wanted = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    model = TokenizerOnly(tokenizer)
    assert tokenizer.decode(prompt_ids(model, prompt)) == wanted
    for response in (" blue", [says(" blue")]):
        found = texts(template, prompt, response, " seven")
        whole = tokenizer.apply_chat_template([prompt[0], says(words + " blue")], tokenize=False)
        assert found[0] == wanted and whole.startswith(found[0] + found[1]) and found[1].endswith("blue")
    item = gr.MultipleChoice(prompt, (" blue", " seven"), (True, False))
    assert tokenize_choices(model, [item])[0].prompt == tuple(tokenizer(wanted, add_special_tokens=False)["input_ids"])


def test_only_the_assistant_goes_on() -> None:
    with pytest.raises(
        RecordError, match="record 1: .*ends with the assistant's words, but chosen begins with role 'user'"
    ):
        texts("chatml", [user("Hi"), says("So")], [user("Well"), says("Yes")], "No")


# -- content as rendered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        ("chatml", [system("system"), user("user"), says("assistant"), user("im")], "system|user|assistant|im"),
        ("gemma", [user("  a b \n")], "a b"),
        ("llama2", [system("SYS"), user("INST"), says("s"), user("x")], "SYS|INST|s|x"),
        ("one_line", [user("first\nsecond"), says("a"), user(" b ")], "first second|a|b"),
        ("qwen3", [user("a"), says("<think>\nlong\n</think>\n\nb"), user("c")], "a|b|c"),
        ("qwen3", [user("a"), says("b", reasoning_content="hm"), user("c")], "a|b|c"),
        ("reminds", [user("Who?"), says("I"), user("You")], "Who?|Who?|Who?|I|Who?|You|Who?"),
    ],
)
def test_content_is_found_as_it_is_rendered(template: str, prompt: Any, expected: str) -> None:
    assert content(template, prompt) == expected


@pytest.mark.parametrize(
    ("template", "message"), [("forgets", r"message 1 of the prompt \(role 'system'"), ("shouts", "rewrites")]
)
def test_words_that_get_lost_are_named(template: str, message: str) -> None:
    with pytest.raises(RecordError, match=f"record 1: .*{message}"):
        content(template, [system("Be short."), user("Hi")])


# -- what stands in front -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "bos", "said"),
    [
        (("<eos>", "<bos>"), None, r"ids \[2, 1\] put before"),
        (("<bos>",), None, r"ids \[1\] put before"),
        (("<bos>",), "<bos>", "BOS id 1 added"),
        (("<bos>", "<pad>"), "<bos>", r"ids \[1, 0\] put before"),
        ((), "<bos>", "no BOS added"),
    ],
)
def test_the_tokenizers_own_first_tokens(front: tuple[str, ...], bos: str | None, said: str) -> None:
    """Was a bug: only a declared BOS was put in front."""
    tokenizer = starting_with(*front, bos=bos)
    model = TokenizerOnly(tokenizer)
    pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("film was", " good", " bad")])[0]
    assert [*pair.prompt, *pair.chosen] == tokenizer("film was good")["input_ids"]
    assert pair.content == (False,) * len(front) + (True, True)
    assert re.match(said, gr.tokens.token_rules(model).describe())
    assert prompt_ids(model, "film was") == tokenizer("film was")["input_ids"]


def test_closing_tokens_are_left_out() -> None:
    tokenizer = starting_with("<bos>", bos="<bos>", end="<eos>")
    model = TokenizerOnly(tokenizer)
    pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("film was", " good", " bad")])[0]
    assert [*pair.prompt, *pair.chosen, 2] == tokenizer("film was good")["input_ids"]
    assert "closing ids [2] left out" in gr.tokens.token_rules(model).describe()
