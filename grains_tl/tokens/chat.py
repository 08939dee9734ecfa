"""Conversations through a model's chat template: the rendered text, and where each message stands in it.

A message's words are never searched in the rendered text: a role marker, a channel name or a thought may say the same. The
conversation is rendered once more with a mark in place of the words, or behind them. What the template writes before and
after the mark is what it writes before and after the words, and the two renderings must agree; where they do not, the
record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grains_tl.tokens.images import as_parts
from grains_tl.tokens.message_strings import THOUGHTS, MessageString, joined, message_strings, words_of
from grains_tl.types import Message, Text

#: Upper and lower case, so that a template that changes letters is noticed.
MARK = "xQzMark"

#: How a rendering ends: all messages closed, an answer's header opened, or the last message left open.
End = Literal["closed", "answer", "continue"]


@dataclass(frozen=True)
class Chat:
    """One conversation and the template that renders it.

    Attributes:
        template: the tokenizer, or the processor, whose ``apply_chat_template`` renders it.
        messages: what comes before the answer.
        tools: functions the template lists for the model; ``None`` without.
    """

    template: Any
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None

    @property
    def end(self) -> End:
        """``"continue"`` where the last words are the assistant's: an answer goes on with them."""
        return "continue" if self.messages[-1].get("role") in ("assistant", "model") else "answer"

    def prompt(self) -> str:
        """The rendered prompt, up to where the answer begins.

        Raises:
            ValueError: the template refuses the messages, or leaves tools or tool calls out.
        """
        if self.end == "continue" and self.messages[-1].get("tool_calls"):
            raise ValueError(
                "the prompt ends with the assistant's tool call, which cannot be continued; add the message that answers "
                "the call (role 'tool')"
            )
        text = self._render(self.messages, "the prompt", self.end)
        self._require_calls(self.messages, text, "the prompt", self.end)
        if self.tools and self._same(Chat(self.template, self.messages), self.messages, text, self.end):
            raise ValueError(
                "the chat template leaves out the record's tools; drop the column, or use a template with tools"
            )
        return text

    def response(self, prompt_text: str, response: Text, name: str) -> str:
        """What the template renders of an answer, from the end of the prompt to the answer's last words or tool call.

        The end-of-turn marker is left out.

        Args:
            prompt_text: what ``prompt`` gave.
            response: messages, or the text of one.
            name: what error messages call the answer.

        Raises:
            ValueError: the template refuses, rewrites or drops it, or renders the prompt differently in front of it.
        """
        messages = self._followed_by(response, name)
        what = f"the prompt with {name}"
        full = self._render(messages, what)
        if not full.startswith(prompt_text):
            raise ValueError(_changed_prompt(prompt_text, full, name))
        new = range(len(self.messages) - (self.end == "continue"), len(messages))
        self._require_calls(messages, full, name, "closed", new)
        self._require_thoughts(messages, full, name)
        return full[len(prompt_text) : self._end_of_words(messages, full, name)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the messages' words, thoughts and tool calls stand in the rendered prompt, as pairs of characters.

        Args:
            text: what ``prompt`` gave.

        Raises:
            ValueError: words of a message that the template leaves out or rewrites beyond recognition.
        """
        leaves = list(message_strings(self.messages))
        return self._spans_at_once(text, leaves) or [span for leaf in leaves for span in self._spans_of(text, leaf)]

    def _spans_at_once(self, text: str, leaves: Sequence[MessageString]) -> list[tuple[int, int]] | None:
        """One rendering with every string marked; ``None`` where it does not account for the whole text."""
        mark, messages = self._mark(), list(self.messages)
        for number, leaf in enumerate(leaves):
            messages[leaf.message] = leaf.put(messages[leaf.message], f"{mark}{number}x")
        try:
            rendered = self._render(messages, "", self.end)
        except ValueError:
            return None
        between = re.split(f"{mark}(\\d+)x", rendered)
        if [int(number) for number in between[1::2]] != list(range(len(leaves))):
            return None
        fixed = between[::2]
        spans, at = [], len(fixed[0])
        if not text.startswith(fixed[0]):
            return None
        for leaf, after in zip(leaves, fixed[1:], strict=True):
            words = next((w for w in (leaf.text, leaf.text.strip()) if text.startswith(w + after, at)), None)
            if words is None:
                return None
            spans.append(_stripped(text, at, at + len(words)))
            at += len(words) + len(after)
        return spans if at == len(text) else None

    def _spans_of(self, text: str, leaf: MessageString) -> list[tuple[int, int]]:
        """One string marked: whatever the template makes of it stands between what it writes around the mark."""
        mark, messages = self._mark(), list(self.messages)
        messages[leaf.message] = leaf.put(messages[leaf.message], mark)
        try:
            fixed = self._render(messages, "", self.end).split(mark)
        except ValueError:
            fixed = []
        times, length = len(fixed) - 1, len(text) - sum(map(len, fixed))
        if times > 0 and length > 0 and length % times == 0:
            starts = [0]
            for part in fixed:
                starts.append(starts[-1] + len(part) + length // times)
            if all(text.startswith(part, start) for part, start in zip(fixed, starts, strict=False)):
                begins = [start + len(part) for part, start in zip(fixed[:-1], starts, strict=False)]
                return [_stripped(text, begin, begin + length // times) for begin in begins]
        if leaf.optional:  # thoughts of earlier turns are left out by many templates
            return []
        role = self.messages[leaf.message].get("role")
        raise ValueError(
            f"the chat template leaves out or rewrites message {leaf.message + 1} of the prompt (role {role!r}, "
            f"{_short(leaf.text)}), so its words cannot be told from the template's; change the message, or give the "
            "rendered prompt as plain text"
        )

    def _followed_by(self, response: Text, name: str) -> list[Message]:
        """All messages: the answer's first one joined to the prompt's last one, if that is to be continued."""
        answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        if any(isinstance(m.get("content"), (list, tuple)) for m in self.messages):  # a template that takes parts
            answer = [as_parts(message) for message in answer]
        last, first = self.messages[-1], answer[0]
        if self.end != "continue":
            if first.get("role") in ("user", "system", "tool"):
                raise ValueError(
                    f"{name} begins with role {first.get('role')!r}; an answer begins with the assistant's message, and the "
                    "prompt's own messages stand in the prompt only"
                )
            return [*self.messages, *answer]
        if first.get("role") != last.get("role"):
            raise ValueError(
                f"the prompt ends with the assistant's words, but {name} begins with role {first.get('role')!r}; begin it "
                "with the assistant's message that continues them, or end the prompt with the user's message"
            )
        continued = {**last, **first, "content": joined(last.get("content"), first.get("content"))}
        return [*self.messages[:-1], continued, *answer[1:]]

    def _end_of_words(self, messages: Sequence[Message], full: str, name: str) -> int:
        """Where the last message's words or tool calls end in the rendered conversation."""
        *before, last = messages
        mark = self._mark()
        plain = {key: value for key, value in last.items() if key != "tool_calls"}
        marked = {**plain, "content": joined(last.get("content") or "", mark)}
        words, found, closing = self._render([*before, marked], name).rpartition(mark)
        if last.get("tool_calls"):
            # the calls come after the words; a template may close them in its own way, which is then scored too
            return len(full) - len(closing) if found and full.endswith(closing) else len(full)
        end = len(full) - len(closing)
        if not found or not full.endswith(closing) or full[:end] not in (words, words.rstrip()):
            raise ValueError(
                f"the chat template rewrites the response ({name}: {_short(words_of(last))}), so its end cannot be found; "
                "give the rendered prompt and response as plain text"
            )
        return end

    def _require_calls(
        self, messages: Sequence[Message], text: str, name: str, end: End = "closed", among: Sequence[int] | None = None
    ) -> None:
        for i in range(len(messages)) if among is None else among:
            if messages[i].get("tool_calls"):
                without = {key: value for key, value in messages[i].items() if key != "tool_calls"}
                if self._same(self, [*messages[:i], without, *messages[i + 1 :]], text, end):
                    raise ValueError(
                        f"the chat template leaves out the tool_calls of {name}; use a template that shows them"
                    )

    def _require_thoughts(self, messages: Sequence[Message], full: str, name: str) -> None:
        last = messages[-1]
        given = [field for field in THOUGHTS if last.get(field)]
        without = {key: value for key, value in last.items() if key not in given}
        if given and self._same(self, [*messages[:-1], without], full, "closed"):
            raise ValueError(
                f"the chat template leaves out the {given[0]} of {name}; drop it, or write the thoughts into the content "
                "as the model would"
            )

    @staticmethod
    def _same(chat: Chat, messages: Sequence[Message], text: str, end: End) -> bool:
        """Whether other messages render to the same text; those that the template refuses do not."""
        try:
            return chat._render(messages, "", end) == text
        except ValueError:
            return False

    def _mark(self) -> str:
        said, mark = repr(self.messages), MARK
        while mark in said:
            mark += "Q"
        return mark

    def _render(self, messages: Sequence[Message], what: str, end: End = "closed") -> str:
        options: dict[str, Any] = {"add_generation_prompt": end == "answer"}
        if end == "continue":
            options["continue_final_message"] = True
        if self.tools:
            options["tools"] = list(self.tools)
        return render(self.template, messages, what, **options)


def render(template: Any, messages: Sequence[Message], what: str = "the prompt", **options: Any) -> str:
    """``template.apply_chat_template`` as text; its errors say what was refused, and why.

    Args:
        template: a tokenizer or processor.
        messages: the conversation.
        what: what error messages call it.
        options: go on to ``apply_chat_template``.

    Raises:
        ValueError: whatever the template raises, its own reason quoted.
    """
    try:
        given = [{key: value for key, value in m.items() if value is not None} for m in messages]
        return str(template.apply_chat_template(given, tokenize=False, **options))
    except Exception as error:  # a template is a program: jinja2's errors, and any that its expressions raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the chat template refuses {what} ({reason}); change the messages (roles, their order, a system message), or "
            "give plain text"
        ) from error


def _stripped(text: str, begin: int, end: int) -> tuple[int, int]:
    words = text[begin:end]
    return begin + len(words) - len(words.lstrip()), end - len(words) + len(words.rstrip())


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _changed_prompt(prompt_text: str, full: str, name: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(prompt_text, full, strict=False)) if a != b), len(full))
    return (
        f"the chat template renders prompt + response differently from the prompt alone: after "
        f"{prompt_text[max(0, n - 20) : n]!r} the prompt goes on with {prompt_text[n : n + 30]!r}, and in front of {name} "
        f"with {full[n : n + 30]!r}. Give the thoughts of the response too if the template opens them (reasoning_content), "
        "or give the rendered prompt and response as plain text"
    )
