"""Chat templates in the manner of the families that people use, and a character tokenizer that keeps every word of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.fakes import FakeModel

_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + _GENERATION,
    # no generation prompt at all
    "plain": "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}",
    # Gemma: trimmed, no system role, roles alternate, another name for the assistant
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # Llama 2: the system message stands inside the first user's turn
    "llama2": "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}",
    # Qwen 3: thoughts of the last turn are shown, an empty block where there are none; older ones are cut out
    "qwen3": "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% set content = (m.content or '') %}{% set thoughts = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + call | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + _GENERATION,
    # gpt-oss: a channel in every header, calls end in their own way
    "channels": "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}{{ '<|channel|>commentary<|message|>' + (m.content or '') + m.tool_calls | tojson "
    "+ '<|call|>' }}{% else %}{{ '<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% else %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    # DeepSeek R1: the generation prompt opens the thoughts
    "opens_thoughts": "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
    # line breaks become spaces, and every message is quoted
    "one_line": "{% for m in messages %}{{ m.role + ': \"' + m.content | replace('\n', ' ') | trim + '\" ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: \"' }}{% endif %}",
    # the first message is repeated in every turn
    "reminds": "{% for m in messages %}{{ '(' + messages[0].content + ') ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(' + messages[0].content + ') assistant: ' }}{% endif %}",
    "shouts": "{% for m in messages %}{{ m.role + ': ' + m.content | upper + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "forgets": "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


def bytes_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, so that every character counts; markers in ``<|...|>`` are tokens of their own."""
    vocab = {c: i for i, c in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    markers = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", additional_special_tokens=markers)
    tokenizer.chat_template = template
    return tokenizer


class TokenizerOnly(FakeModel):
    """Enough of a model to tokenize for, with a long context."""

    def __init__(self, tokenizer: Any) -> None:
        self.cfg, self.tokenizer = SimpleNamespace(n_ctx=1_000_000, d_vocab=1_000_000), tokenizer
        super().__init__()
