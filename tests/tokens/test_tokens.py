"""Token rules, spans of prompt and response, content masks, batches and their targets."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import grains_tl as gr
from grains_tl.inference.batches import Batch, by_token_budget, pad_rows, scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.tokens.prompts import prompt_ids
from tests.conftest import KINDS, WORDS, tiny_hf, tiny_model, tiny_tokenizer
from tests.helpers.fakes import FakeModel
from tests.helpers.oracles import response_logprobs

LOGPROB_ATOL = 1e-4  # float32 round-off of log-probabilities of some nats, summed in another order
BOS, EOS = WORDS.index("<bos>"), WORDS.index("<eos>")
CHAT = [{"role": "user", "content": "food was good"}]


class NoModel(FakeModel):
    """Enough of a model to tokenize for; running it is a mistake."""

    def __init__(self, tokenizer: Any, n_ctx: int = 64) -> None:
        self.cfg, self.tokenizer = SimpleNamespace(n_ctx=n_ctx, d_vocab=len(WORDS)), tokenizer
        super().__init__()

    def parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter([torch.zeros(1)])


def words(*text: str) -> tuple[int, ...]:
    return tuple(WORDS.index(w) for w in " ".join(text).split())


def one(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any) -> gr.tokens.TokenizedPair:
    return gr.tokens.tokenize_pairs(NoModel(tokenizer), [gr.PreferencePair(prompt, chosen, rejected)])[0]


def bare_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The tiny word-level tokenizer with only the special tokens that are named."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="room"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, adding BOS by itself as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding in which "c" + "d" merge, also across the end of a prompt."""
    vocab = {c: i for i, c in enumerate(["<eos>", *"abcdefgh ", "cd", "cde"])}
    core = Tokenizer(models.BPE(vocab, [("c", "d"), ("cd", "e")]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


# -- spans ------------------------------------------------------------------------------------------------------------


def test_spans_and_strings() -> None:
    pair = one(tiny_tokenizer(), "the film was good", " and we liked it", " but bad")
    assert pair.prompt == words("the film was good")
    assert pair.chosen == words("and we liked it")
    assert pair.rejected == words("but bad")
    assert pair.strings == ("the", "film", "was", "good")
    assert pair.moved_border == 0


def test_merge_across_the_border_moves_it() -> None:
    tokenizer = merging_tokenizer()
    pair = one(tokenizer, "abc", "de", "ef")
    assert "".join(pair.strings).replace(" ", "") == "ab"
    assert pair.moved_border == 1
    assert tokenizer.convert_ids_to_tokens(list(pair.chosen)) == ["cde"]
    assert tokenizer.convert_ids_to_tokens(list(pair.rejected)) == ["c", "e", "f"]
    assert len(pair.content) == len(pair.strings) == len(pair.prompt) == 2


@pytest.mark.parametrize(("chosen", "rejected"), [("de", "ef"), ("d", "hg"), ("fe", "da"), ("f", "g")])
def test_margin_is_that_of_the_whole_texts(chosen: str, rejected: str) -> None:
    """log p(whole text) of both, as the tokenizer cuts them, differ by the margin, wherever the border was put."""
    hf, model, tokenizer = tiny_hf(), tiny_model(), merging_tokenizer()
    model.tokenizer = tokenizer
    pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("abc", chosen, rejected)])
    whole = []
    for response in (chosen, rejected):
        ids = tokenizer("abc" + response)["input_ids"]
        whole.append(response_logprobs(hf, ids[:1], ids[1:]).sum())
    found = gr.score_pairs(model, pair)[0]
    assert pair[0].moved_border == (1 if "d" in (chosen[0], rejected[0]) else 0)
    torch.testing.assert_close(found[0] - found[1], whole[0] - whole[1], atol=LOGPROB_ATOL, rtol=0)


def test_prompt_that_merges_away() -> None:
    with pytest.raises(ValueError, match="record 1: the whole prompt becomes part"):
        one(merging_tokenizer(), "c", "d", "e")


def test_same_tokens_on_both_sides() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        one(tiny_tokenizer(), "film was", " good", "  good ")


def test_response_without_tokens() -> None:
    with pytest.raises(ValueError, match="chosen adds no token"):
        one(bare_tokenizer_dropping("zz"), "film was", "zz", " good")


def bare_tokenizer_dropping(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that throws some text away."""
    from tokenizers.normalizers import Replace

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace(text, "")
    return tokenizer


# -- special tokens ---------------------------------------------------------------------------------------------------


def test_bos_is_added_once_where_the_tokenizer_adds_it() -> None:
    tokenizer = bos_tokenizer()
    assert gr.tokens.token_rules(NoModel(tokenizer)).bos == BOS
    pair = one(tokenizer, "film was", " good", " bad")
    assert pair.prompt == (BOS, *words("film was"))
    assert pair.chosen == words("good") and pair.rejected == words("bad")
    assert one(tokenizer, "<bos> film was", " good", " bad").prompt == pair.prompt
    assert pair.content == (False, True, True)


def test_bos_is_not_added_where_the_tokenizer_does_not_add_it() -> None:
    assert gr.tokens.token_rules(NoModel(tiny_tokenizer())).bos is None
    assert one(tiny_tokenizer(), "film was", " good", " bad").prompt == words("film was")


def test_chat_template_gets_no_bos() -> None:
    assert BOS not in one(bos_tokenizer(), CHAT, "great", "awful").prompt


@pytest.mark.parametrize(
    ("special", "eos", "pad"),
    [
        ({}, 0, 0),
        ({"eos_token": "<eos>"}, EOS, EOS),
        ({"pad_token": "<pad>", "bos_token": "<bos>"}, 0, 0),
        ({"bos_token": "<bos>"}, BOS, BOS),
    ],
)
def test_missing_special_tokens(special: dict[str, str], eos: int, pad: int) -> None:
    rules = gr.tokens.token_rules(NoModel(bare_tokenizer(**special)))
    assert (rules.bos, rules.eos, rules.pad) == (None, eos, pad)
    assert rules.describe().startswith("no BOS added")


# Was a bug: TransformerLens gives such a tokenizer an "<|endoftext|>" beyond the embedding's last row (or, for a
# HookedTransformer, a special id None); token_rules takes it for pad and eos.
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_without_special_tokens_scores_the_same(kind: str, pairs: list[gr.PreferencePair]) -> None:
    """Whatever id is under the padding, the attention mask must hide it."""
    hf, model = tiny_hf(), tiny_model(kind, tokenizer=bare_tokenizer())
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    wanted = torch.tensor(
        [[response_logprobs(hf, t.prompt, r).sum() for r in (t.chosen, t.rejected)] for t in tokenized]
    )
    torch.testing.assert_close(gr.score_pairs(model, tokenized), wanted, atol=LOGPROB_ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_decided_ids_are_in_the_vocabulary(kind: str) -> None:
    rules = gr.tokens.token_rules(tiny_model(kind, tokenizer=bare_tokenizer()))
    assert 0 <= rules.eos < len(WORDS) and 0 <= rules.pad < len(WORDS)


def test_special_tokens_are_no_content() -> None:
    pair = one(tiny_tokenizer(), "<bos> film <eos> was <pad> good", " and", " but")
    assert pair.content == (False, True, False, True, False, True)
    assert pair.n_content == 3


def test_model_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        one(None, "film was", " good", " bad")


# -- conversations ----------------------------------------------------------------------------------------------------


def test_conversation_spans_and_content() -> None:
    pair = one(tiny_tokenizer(), CHAT, "great soup", [{"role": "assistant", "content": "awful"}])
    assert pair.prompt == words("question : food was good <eos> answer :")
    assert pair.content == (False, False, True, True, True, False, False, False)
    assert pair.chosen == words("great soup")  # the end marker is not scored
    assert pair.rejected == words("awful")


def test_several_turns() -> None:
    turns = [*CHAT, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and we liked it"}]
    pair = one(tiny_tokenizer(), turns, "great", "awful")
    assert [s for s, keep in zip(pair.strings, pair.content, strict=True) if keep] == [
        "food",
        "was",
        "good",
        "yes",
        "and",
        "we",
        "liked",
        "it",
    ]


# Was a bug: _content_mask takes the first occurrence of the words, which may be the role marker.
def test_words_that_also_stand_in_the_template_are_found_in_the_message() -> None:
    """A user who writes a role's name: the role marker is template, the user's word is content."""
    pair = one(tiny_tokenizer(), [{"role": "user", "content": "question"}], "great", "awful")
    assert pair.prompt == words("question : question <eos> answer :")
    assert pair.content == (False, False, True, False, False, False)


# Was a bug: _response_text looks for the response's words from the end (rfind), inside the end marker.
def test_response_that_also_stands_in_the_end_marker() -> None:
    """ "e" is in "<eos>"; a letter as answer is what multiple-choice records have."""
    pair = one(tiny_tokenizer(), CHAT, "e", "awful")
    assert len(pair.chosen) == 1 and pair.rejected == words("awful")


def test_conversation_without_a_template() -> None:
    with pytest.raises(ValueError, match="record 1: .*no chat template"):
        one(tiny_tokenizer(chat=False), CHAT, "great", "awful")


def test_template_that_changes_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} : {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="renders prompt \\+ response differently"):
        one(tokenizer, CHAT, "great", "awful")


def test_template_that_rewrites_the_response() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper + ' : ' }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites the response"):
        one(tokenizer, CHAT, "great", "awful")


# -- context ----------------------------------------------------------------------------------------------------------


def test_record_longer_than_the_context_is_named() -> None:
    model = NoModel(tiny_tokenizer(), n_ctx=8)
    fits = gr.PreferencePair("one two three four five six", " was good", " bad")
    too_long = gr.PreferencePair("one two three four five six", " bad", " was very good")
    assert len(gr.tokens.tokenize_pairs(model, [fits])[0].prompt) == 6
    with pytest.raises(ValueError, match=r"record 2: prompt \+ rejected is 9 tokens, and the model's context holds 8"):
        gr.tokens.tokenize_pairs(model, [fits, too_long])


def test_no_records() -> None:
    with pytest.raises(ValueError, match="no records"):
        gr.tokens.tokenize_pairs(NoModel(tiny_tokenizer()), [])


def test_prompt_ids() -> None:
    model = NoModel(bos_tokenizer(), n_ctx=4)
    assert prompt_ids(model, "film was") == [BOS, *words("film was")]
    with pytest.raises(ValueError, match="prompt is empty"):
        prompt_ids(model, "  ")
    with pytest.raises(ValueError, match="4 tokens, and the model's context holds 4"):
        prompt_ids(model, "one two three")
    assert prompt_ids(NoModel(tiny_tokenizer()), CHAT) == list(words("question : food was good <eos> answer :"))


# -- batches ----------------------------------------------------------------------------------------------------------


def batch_of(*texts: tuple[str, str, str], side: str = "right") -> Batch:
    model = NoModel(tiny_tokenizer())
    pairs = [gr.PreferencePair(*t) for t in texts]
    return scoring_batch(model, gr.tokens.tokenize_pairs(model, pairs), padding_side=side)


def test_single_token_responses_share_a_row() -> None:
    batch = batch_of(("film was", " good", " bad"))
    assert batch.ids.tolist() == [list(words("film was"))]
    assert batch.target_row.tolist() == [0, 0]
    assert batch.keep[batch.target_keep].tolist() == [1, 1]
    assert batch.target_id.tolist() == list(words("good bad"))
    assert batch.target_slot.tolist() == [0, 1]


def test_a_response_that_begins_like_the_other_shares_its_row() -> None:
    batch = batch_of(("film was", " good", " good and warm"))
    assert batch.ids.tolist() == [list(words("film was good and"))]
    assert batch.target_id.tolist() == list(words("good good and warm"))
    assert batch.keep[batch.target_keep].tolist() == [1, 1, 2, 3]


def test_other_responses_have_a_row_each() -> None:
    batch = batch_of(("film was", " very good", " not bad"))
    assert batch.ids.tolist() == [list(words("film was very")), list(words("film was not"))]
    assert batch.target_row.tolist() == [0, 0, 1, 1]
    assert batch.keep.tolist() == [1, 2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_prompt_mask(side: str) -> None:
    batch = batch_of(("film was", " good", " bad"), ("this film was very", " good", " bad"), side=side)
    real = [[1, 1, 0, 0], [1, 1, 1, 1]] if side == "right" else [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.attention_mask.tolist() == real
    assert batch.prompt_mask().int().tolist() == real
    assert batch.offset.tolist() == ([0, 0] if side == "right" else [2, 0])
    spread = batch.scatter_prompt([[True, False], [False, False, False, True]]).int().tolist()
    assert spread == [[1, 0, 0, 0] if side == "right" else [0, 0, 1, 0], [0, 0, 0, 1]]


def test_prompt_mask_leaves_the_response_out() -> None:
    batch = batch_of(("film was", " very good", " not bad"))
    assert batch.prompt_mask().int().tolist() == [[1, 1, 0], [1, 1, 0]]


def test_left_and_right_padding_agree(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    with torch.no_grad():
        right, left = (
            batch_logprobs(model, scoring_batch(model, tokenized, padding_side=s)) for s in ("right", "left")
        )
    torch.testing.assert_close(left, right, atol=LOGPROB_ATOL, rtol=0)


def test_unknown_padding_side() -> None:
    with pytest.raises(ValueError, match="middle"):
        pad_rows(NoModel(tiny_tokenizer()), [[1, 2]], padding_side="middle")


@settings(deadline=None)
@given(items=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 9)), max_size=40), budget=st.integers(1, 900))
def test_budget_is_kept_and_nothing_is_lost(items: list[tuple[int, int]], budget: int) -> None:
    lengths, n_rows = [length for length, _ in items], [rows for _, rows in items]
    groups = by_token_budget(lengths, n_rows, max_tokens=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(n_rows[i] for i in group) * max(lengths[i] for i in group) <= budget
    for shorter, longer in itertools.pairwise(groups):
        first = longer[0]
        assert max(lengths[i] for i in shorter) <= min(lengths[i] for i in longer)  # similar lengths together
        assert (sum(n_rows[i] for i in shorter) + n_rows[first]) * lengths[first] > budget  # and no batch cut early
    ones = [1] * len(lengths)
    assert by_token_budget(lengths, max_tokens=budget) == by_token_budget(lengths, ones, max_tokens=budget)
