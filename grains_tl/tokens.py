"""Everything about token ids: rules of one tokenizer, spans of prompt and response, padded batches with their targets.

BOS, chat markers, padding and the border between prompt and response are decided here and nowhere else;
``token_rules(model).describe()`` shows the decisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from grains_tl.images import (
    ImageInputs,
    as_parts,
    load_images,
    process_images,
    refuse_lost_image,
    template_owner,
    with_placeholders,
)
from grains_tl.models import adds_bos
from grains_tl.types import (
    HookedModel,
    Message,
    PreferencePair,
    Text,
    message_texts,
    plain_text,
    preference_pairs,
    require_text,
)


@dataclass(frozen=True)
class TokenRules:
    """What was decided about a tokenizer.

    Attributes:
        bos: id put before plain-text prompts, or ``None``: added if the tokenizer itself adds it, unless the model's
            ``cfg.default_prepend_bos`` is off, as in ``model.to_tokens``. Chat templates write their own markers, nothing
            is added to them.
        eos: end-of-text / end-of-turn id, the replacement of tokens masked with ``"eos"`` (as in GrAInS for LLMs).
        pad: id under padding; the attention mask hides it, so any id will do where there is no pad token.
        special: ids that are never content.
        n_ctx: longest sequence the model takes.
        has_chat_template: whether conversational prompts can be rendered.

    Example:
        >>> token_rules(model).describe()     # doctest: +SKIP
        'no BOS added; pad id 2, padded right and masked; end id 2; context 8192; chat template present'
    """

    bos: int | None
    eos: int
    pad: int
    special: frozenset[int]
    n_ctx: int
    has_chat_template: bool

    def describe(self) -> str:
        """One line for a human."""
        bos = "no BOS added" if self.bos is None else f"BOS id {self.bos} added to plain-text prompts"
        chat = "chat template present" if self.has_chat_template else "no chat template"
        return f"{bos}; pad id {self.pad}, padded right and masked; end id {self.eos}; context {self.n_ctx}; {chat}"


def token_rules(model: HookedModel) -> TokenRules:
    """Decide BOS, padding and special tokens for a model once.

    Raises:
        ValueError: the model has no tokenizer.

    Example:
        >>> token_rules(model).describe()  # doctest: +SKIP
        'no BOS added; pad id 2, padded right and masked; end id 2; context 8192; chat template present'
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer (or model.set_tokenizer) first")
    bos = tokenizer.bos_token_id
    # TransformerLens may have given the tokenizer special tokens that the embedding has no row for
    known = range(int(model.cfg.d_vocab))
    special = {int(i) for i in tokenizer.all_special_ids if i in known}
    has_bos = adds_bos(tokenizer) and getattr(model.cfg, "default_prepend_bos", None) is not False
    candidates = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, bos) if i in known]
    fallback = candidates[0] if candidates else 0
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in known else fallback
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id in known else fallback
    return TokenRules(
        bos=int(bos) if has_bos else None,
        eos=int(eos),
        pad=int(pad),
        special=frozenset(special),
        n_ctx=int(model.cfg.n_ctx),
        has_chat_template=getattr(template_owner(model), "chat_template", None) is not None,
    )


@dataclass(frozen=True)
class TokenizedPair:
    """A preference record as token ids.

    Attributes:
        prompt: ids up to the border.
        chosen: ids of the preferred response after the border.
        rejected: ids of the other response.
        content: for every prompt token, whether it carries the user's words (not BOS, special, or chat template).
        strings: the prompt's tokens as text.
        starts_word: for every prompt token, whether a word begins there (word pieces go on with the word before).
        moved_border: how many prompt tokens were given to the responses because a token merges across the border
            (0 almost always). Both responses then begin with those characters, so their comparison stays right.
        images: the images of the prompt as the model takes them; ``None`` without.

    Example:
        >>> t = tokenize_pairs(model, pairs)[0]     # doctest: +SKIP
        >>> len(t.prompt) == len(t.strings)         # doctest: +SKIP
        True
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    content: tuple[bool, ...]
    strings: tuple[str, ...]
    moved_border: int = 0
    images: ImageInputs | None = None
    starts_word: tuple[bool, ...] = ()

    @property
    def is_image(self) -> tuple[bool, ...]:
        """For every prompt token, whether an image feature stands there."""
        return (False,) * len(self.prompt) if self.images is None else self.images.is_image

    @property
    def n_content(self) -> int:
        """Number of content tokens in the prompt, image patches included."""
        return sum(self.content)

    @property
    def n_patches(self) -> int:
        """Number of content tokens that show a part of an image."""
        return sum(c and i for c, i in zip(self.content, self.is_image, strict=True))

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """Input rows that score both responses: one, if an input is the beginning of the other, else two.

        The last token of a response is never an input.
        """
        rows = (self.prompt + self.chosen[:-1], self.prompt + self.rejected[:-1])
        short, long = sorted(rows, key=len)
        return (long,) if long[: len(short)] == short else rows

    @property
    def longest(self) -> int:
        """Length of the longest input row."""
        return max(len(row) for row in self.inputs)


def tokenize_pairs(model: HookedModel, pairs: Iterable[PreferencePair]) -> list[TokenizedPair]:
    """Tokenize records and check them against the model, all before anything runs.

    Spans come from tokenizing prompt and prompt + response: the prompt is what both tokenizations share. For
    conversational records the response ends with its words; the end-of-turn marker is not scored.

    Args:
        model: gives the tokenizer, and the processor for records with images.
        pairs: the records.

    Returns:
        One ``TokenizedPair`` per record, in their order.

    Raises:
        ValueError: no records, a record that is too long for the context, a response without tokens, a conversational
            record for a tokenizer without chat template, an image for a model without a processor; the message names
            the record (from 1).

    Example:
        >>> toks = tokenize_pairs(model, load_bundled("sentiment", "choose"))  # doctest: +SKIP
        >>> toks[0].chosen, toks[0].moved_border                              # doctest: +SKIP
    """
    rules = token_rules(model)
    records = preference_pairs(pairs)
    if not records:
        raise ValueError("no records; at least one preference pair is needed")
    tokenized = []
    for number, pair in enumerate(records, start=1):
        try:
            tokenized.append(_tokenize(model, rules, pair))
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from None
    return tokenized


#: What functions take that measure records: as they were loaded, or as ``tokenize_pairs`` made them.
Records = Sequence[TokenizedPair] | Sequence[PreferencePair]


def as_tokenized(model: HookedModel, records: Any) -> list[TokenizedPair]:
    """The records tokenized, whether they were or not.

    Args:
        model: as for ``tokenize_pairs``.
        records: a list of ``PreferencePair``, or of ``TokenizedPair``, which stays as it is.

    Raises:
        ValueError: one record alone, both kinds in one list, or something else; also as ``tokenize_pairs``.

    Example:
        >>> as_tokenized(model, pairs) == tokenize_pairs(model, pairs)     # doctest: +SKIP
        True
    """
    wanted = "a list of PreferencePair (load_pairs) or of TokenizedPair (tokenize_pairs) is needed"
    if isinstance(records, (str, Mapping)) or not hasattr(records, "__iter__"):
        raise ValueError(f"records are a {type(records).__name__}; {wanted}: [record] for one")
    given = list(records)
    tokenized = [r for r in given if isinstance(r, TokenizedPair)]
    if len(tokenized) == len(given):
        return tokenized
    if tokenized:
        number, other = next((i, r) for i, r in enumerate(given, start=1) if not isinstance(r, TokenizedPair))
        raise ValueError(f"record {number} is a {type(other).__name__} among TokenizedPair; {wanted}, all of one kind")
    return tokenize_pairs(model, given)


def prompt_ids(model: HookedModel, prompt: Text) -> list[int]:
    """Ids of one prompt under the model's token rules (for generation).

    Raises:
        ValueError: an empty prompt, or one longer than the context.
    """
    return prompt_inputs(model, prompt)[0]


def prompt_inputs(model: HookedModel, prompt: Text, image: Any = None) -> tuple[list[int], ImageInputs | None]:
    """Ids of one prompt with its image tokens expanded, and its images.

    Raises:
        ValueError: an empty prompt, one longer than the context, or images the model cannot take.
    """
    rules = token_rules(model)
    require_text("a prompt", prompt)
    if not plain_text(prompt).strip():
        raise ValueError(f"the prompt is empty ({plain_text(prompt)!r}); some text is needed")
    pictures = () if image is None else load_images(image)
    prompt = with_placeholders(model, prompt, len(pictures))
    text = _render(template_owner(model), rules, prompt)
    ids, images = _encode(model.tokenizer, rules, prompt, text)[0], None
    if pictures:
        ids, images = process_images(model, text, pictures, bos=_bos(rules, prompt))
    else:
        refuse_lost_image(model, text, ids)
    if len(ids) >= rules.n_ctx:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context holds {rules.n_ctx}; shorten it")
    return ids, images


def tokenize_responses(
    model: HookedModel, prompt: Text, responses: Sequence[Text]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Ids of a prompt and of any number of responses to it, with one border for all of them.

    Raises:
        ValueError: as ``tokenize_pairs``.
    """
    rules = token_rules(model)
    names = [f"response {i}" for i in range(1, len(responses) + 1)]
    text, ids, _, border, full = _split(model, rules, prompt, dict(zip(names, responses, strict=True)))
    refuse_lost_image(model, text, ids)
    _require_context(rules, border, {name: one[border:] for name, one in zip(names, full, strict=True)})
    return tuple(ids[:border]), tuple(tuple(one[border:]) for one in full)


def text_ids(model: HookedModel, text: str) -> list[int]:
    """Ids of a plain text of any length, BOS included where ``token_rules`` has one."""
    return _encode(model.tokenizer, token_rules(model), text, text)[0]


def _split(
    model: HookedModel, rules: TokenRules, prompt: Text, responses: Mapping[str, Text]
) -> tuple[str, list[int], list[tuple[int, int]] | None, int, list[list[int]]]:
    """The rendered prompt, its ids and offsets; the border; the ids of prompt + response for every response."""
    tokenizer, template = model.tokenizer, template_owner(model)
    prompt_text = _render(template, rules, prompt)
    ids, offsets = _encode(tokenizer, rules, prompt, prompt_text)
    texts = [_response_text(template, prompt, prompt_text, r) for r in responses.values()]
    full = [_encode(tokenizer, rules, prompt, prompt_text + text)[0] for text in texts]
    border = min(common_prefix(ids, one) for one in full)
    if border == 0:
        raise ValueError("the whole prompt merges with the responses into one token; write a longer prompt")
    for name, one in zip(responses, full, strict=True):
        if len(one) == border:
            raise ValueError(f"{name} has no tokens of its own after the prompt; write a longer response")
    return prompt_text, ids, offsets, border, full


def _require_context(rules: TokenRules, border: int, responses: Mapping[str, Sequence[int]]) -> None:
    for name, response in responses.items():
        if border + len(response) > rules.n_ctx:
            raise ValueError(
                f"prompt + {name} is {border + len(response)} tokens, the model's context holds {rules.n_ctx}; shorten "
                "the prompt"
            )


def _tokenize(model: HookedModel, rules: TokenRules, pair: PreferencePair) -> TokenizedPair:
    tokenizer, template = model.tokenizer, template_owner(model)
    pictures = () if pair.image is None else load_images(pair.image)
    source = with_placeholders(model, pair.prompt, len(pictures))
    given = {"chosen": pair.chosen, "rejected": pair.rejected}
    prompt_text, prompt, offsets, border, full = _split(model, rules, source, given)
    if full[0] == full[1]:
        raise ValueError("chosen and rejected give the same tokens; there is nothing to prefer")
    content = _content_mask(template, rules, source, prompt_text, prompt, offsets)
    moved, chosen, rejected = len(prompt) - border, full[0][border:], full[1][border:]
    images = None
    if pictures:
        given_away = prompt[border:]
        expanded, images = process_images(model, prompt_text, pictures, bos=_bos(rules, source))
        content = _expand_content(prompt, content, expanded, images)
        border, prompt = len(expanded) - moved, expanded
        if prompt[border:] != given_away or any(images.is_image[border:]):
            raise ValueError("a token merges across the border of prompt and response at an image; put text between")
        images = _until(images, border)
    else:
        refuse_lost_image(model, prompt_text, prompt)
    _require_context(rules, border, {"chosen": chosen, "rejected": rejected})
    return TokenizedPair(
        prompt=tuple(prompt[:border]),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        content=tuple(content[:border]),
        strings=tuple(tokenizer.decode([i]) for i in prompt[:border]),
        moved_border=moved,
        images=images,
        starts_word=_word_starts(tokenizer, prompt[:border]),
    )


def _word_starts(tokenizer: Any, ids: Sequence[int]) -> tuple[bool, ...]:
    """Where decoding puts a space before a token: some tokenizers hide it when the token is decoded alone."""
    found = [True]
    for before, this in itertools.pairwise(ids):
        first, both = tokenizer.decode([before]), tokenizer.decode([before, this])
        found.append(both[len(first) : len(first) + 1].isspace())
    return tuple(found[: len(ids)])


def _expand_content(
    short: Sequence[int], content: Sequence[bool], prompt: Sequence[int], images: ImageInputs
) -> list[bool]:
    """Content flags of a prompt, carried over to the same prompt with its images expanded; patches are content."""
    out = [False] * len(prompt)
    for block in SequenceMatcher(None, list(short), list(prompt), autojunk=False).get_matching_blocks():
        out[block.b : block.b + block.size] = content[block.a : block.a + block.size]
    patches = images.patches
    return [p in patches if is_image else out[p] for p, is_image in enumerate(images.is_image)]


def _until(images: ImageInputs, border: int) -> ImageInputs:
    tokens = {key: values[:border] for key, values in images.token_inputs.items()}
    return replace(images, token_inputs=tokens, is_image=images.is_image[:border])


def _render(template: Any, rules: TokenRules, prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    if not rules.has_chat_template:
        raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give plain text")
    return template.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)


def _response_text(template: Any, prompt: Text, prompt_text: str, response: Text) -> str:
    if isinstance(prompt, str):
        return str(response)
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if any(not isinstance(message.get("content"), str) for message in prompt):  # a template that takes parts
        response = [as_parts(message) for message in response]
    full = template.apply_chat_template([*prompt, *response], tokenize=False)
    if not full.startswith(prompt_text):
        raise ValueError(
            "the chat template renders prompt + response differently from the prompt alone; use plain text"
        )
    rest = full[len(prompt_text) :]
    end = 0
    for message in response:
        for words in map(str.strip, message_texts(message)):
            at = rest.find(words, end)
            if at < 0:
                raise ValueError(f"the chat template rewrites the response {words!r}; use plain text")
            end = at + len(words)
    return rest[:end]


def _bos(rules: TokenRules, prompt: Text) -> int | None:
    return rules.bos if isinstance(prompt, str) else None


def _encode(
    tokenizer: Any, rules: TokenRules, prompt: Text, text: str
) -> tuple[list[int], list[tuple[int, int]] | None]:
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = list(encoding["input_ids"])
    offsets = list(encoding["offset_mapping"]) if fast else None
    if rules.bos is not None and isinstance(prompt, str) and ids[:1] != [rules.bos]:
        ids = [rules.bos, *ids]
        offsets = None if offsets is None else [(0, 0), *offsets]
    return ids, offsets


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _content_mask(
    template: Any,
    rules: TokenRules,
    prompt: Text,
    text: str,
    ids: Sequence[int],
    offsets: list[tuple[int, int]] | None,
) -> list[bool]:
    """Content: not special and, in a conversation, inside the words of a message."""
    content = [token not in rules.special for token in ids]
    if isinstance(prompt, str):
        return content
    if offsets is None:
        raise ValueError("a conversation needs a fast tokenizer (character offsets) to tell words from template")
    inside = [False] * len(text)
    for begin, end in _message_spans(template, prompt, text):
        inside[begin:end] = [True] * (end - begin)
    return [keep and any(inside[a:b]) for keep, (a, b) in zip(content, offsets, strict=True)]


def _message_spans(template: Any, prompt: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Where each message's words stand in the rendered text.

    The template is rendered again with a marker in place of one message's words: what stands before the marker is the
    same text, so the words begin there (searching for the words could find a role marker that says the same).
    """
    marker = "\u2603marker\u2603"
    spans = []
    for i, message in enumerate(prompt):
        for part, words in enumerate(map(str.strip, message_texts(message))):
            if not words:
                continue
            changed = [_with_text(m, part, marker) if i == j else m for j, m in enumerate(prompt)]
            rendered = template.apply_chat_template(changed, tokenize=False, add_generation_prompt=True)
            begin = rendered.find(marker)
            if begin >= 0 and text[begin : begin + len(words)] == words:
                spans.append((begin, begin + len(words)))
    return spans


def _with_text(message: Message, part: int, text: str) -> Message:
    """The message with its ``part``-th text replaced."""
    if isinstance(message.get("content", ""), str):
        return {**message, "content": text}
    content = list(message["content"])
    at = [i for i, p in enumerate(content) if p.get("type") == "text"][part]
    content[at] = {**content[at], "text": text}
    return {**message, "content": content}
