"""Continuations under hooks against Hugging Face with plain PyTorch hooks, and against explicit loops without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl._util.errors import RecordError
from grains_tl.hooks.steer import Positions
from tests.conftest import WORDS, tiny_hf, tiny_model, tiny_tokenizer
from tests.helpers.oracles import edited, greedy, steered
from tests.helpers.tokenizers import sentencepiece_like, wordpiece_like

LAYER = 1
N_NEW = 12
LENGTH = 4.0  # of the step, about the residual's own norm in the tiny model: it turns the continuation
ALMOST_GREEDY = 1e-4  # a temperature so low that every logit but the largest has probability 0 in float32
PROMPTS = [
    "the soup was cold but the room was warm . overall it was",
    "the film was good and",
    "question : was the food bad ? answer :",
    "this hotel",
]
SCOPES = [s for s in get_args(Positions) if s != "all"]


def direction() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(3))


def step() -> Tensor:
    return LENGTH * direction() / direction().norm()


def hooks(**options: Any) -> Any:
    return gr.hooks.steer_hook(LAYER, direction(), LENGTH, **options)


def move(act: Tensor) -> Tensor:
    return steered(act, step(), renorm=True)


def move_only(scope: str, prompt_len: int) -> Callable[[Tensor], Tensor]:
    """The steering formula at some positions of a whole sequence, position by position."""
    wanted = {
        "prompt": lambda p: p < prompt_len,
        "generated": lambda p: p >= prompt_len,
        "last": lambda p: p >= prompt_len - 1,
    }[scope]

    def edit(act: Tensor) -> Tensor:
        new = act.clone()
        for position in range(act.shape[1]):
            if wanted(position):
                new[:, position] = move(act[:, position])
        return new

    return edit


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def text_of(ids: Sequence[int]) -> str:
    return str(tiny_tokenizer().decode(list(ids), skip_special_tokens=True))


def rest_of(prompt: str, new: Sequence[int]) -> str:
    """The whole text without the prompt, special tokens left out in both."""
    return text_of([*ids_of(prompt), *new]).removeprefix(text_of(ids_of(prompt)))


def plain_greedy(hf: Any, prompt: str, edit: Callable[[Tensor], Tensor] | None = None) -> str:
    return rest_of(prompt, greedy(hf, ids_of(prompt), N_NEW, None if edit is None else LAYER, edit))


# -- the same text as Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_without_hooks(model: Any, hf: Any, prompt: str) -> None:
    assert gr.generate(model, [prompt], max_new_tokens=N_NEW) == [plain_greedy(hf, prompt)]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_steered_equals_hugging_face_generate(model: Any, hf: Any, prompt: str) -> None:
    ids = torch.tensor([ids_of(prompt)])
    with edited(hf, LAYER, move):
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False)
    wanted = rest_of(prompt, out[0, ids.shape[1] :].tolist())
    assert gr.generate(model, [prompt], hooks(), max_new_tokens=N_NEW) == [wanted]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cached_equals_uncached(model: Any, hf: Any, prompt: str) -> None:
    wanted = plain_greedy(hf, prompt, move)
    assert wanted != plain_greedy(hf, prompt)
    assert gr.generate(model, [prompt], hooks(), max_new_tokens=N_NEW) == [wanted]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_equal_an_explicit_loop(model: Any, hf: Any, scope: Any, told: bool) -> None:
    """With the prompt's length given, and found out from the first pass."""
    wanted = [plain_greedy(hf, p, move_only(scope, len(p.split()))) for p in PROMPTS]
    for prompt, text in zip(PROMPTS, wanted, strict=True):
        given = (lambda n: hooks(positions=scope, prompt_len=n)) if told else hooks(positions=scope)
        assert gr.generate(model, [prompt], given, max_new_tokens=N_NEW) == [text]


def test_scopes_differ(hf: Any) -> None:
    """A negative control: on these prompts the scopes do not lead to the same texts."""
    texts = {
        scope: tuple(plain_greedy(hf, p, move_only(scope, len(p.split()))) for p in PROMPTS)
        for scope in ("prompt", "generated", "last")
    }
    assert len(set(texts.values())) == 3


def test_attention_that_drops_its_cache_is_refused(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens 4.3 with transformers 5.24 wrote every token as if there were nothing before it."""
    attention = type(bridge.blocks[0].attn)
    monkeypatch.setattr(attention, "_update_kv_cache", lambda self, k, v, **kwargs: (k, v))
    inside = [(f"blocks.{LAYER}.attn.hook_q", lambda act, hook: act)]
    with pytest.raises(RuntimeError, match="transformers"):
        gr.generate(bridge, PROMPTS[:1], inside, max_new_tokens=3)
    assert gr.generate(bridge, PROMPTS[:1], hooks(), max_new_tokens=3)  # the model's own attention runs


def test_learned_positions() -> None:
    model, hf = tiny_model("bridge", "gpt2"), tiny_hf("gpt2")
    found = gr.generate(model, PROMPTS, hooks(), max_new_tokens=N_NEW)
    assert found == [plain_greedy(hf, p, move) for p in PROMPTS]


def test_a_conversation_goes_through_the_template(model: Any, hf: Any) -> None:
    chat = [{"role": "user", "content": "was the food bad ?"}]
    rendered = "question : was the food bad ? <eos> answer :"
    assert gr.generate(model, [chat], max_new_tokens=N_NEW) == [plain_greedy(hf, rendered)]


# -- prompt and text join ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, sentencepiece_like, wordpiece_like])
def test_prompt_and_text_are_the_whole_text(tokenizer: Callable[[], Any]) -> None:
    """Was a bug: decoded alone, new tokens lose their first space where the tokenizer hides it."""
    model = tiny_model(tokenizer=tokenizer())
    prompts = ["the film was", "soup and food was not", "the"]
    for prompt, text in zip(prompts, gr.generate(model, prompts, max_new_tokens=N_NEW), strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        out = model.original_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False
        )[0]
        before, whole = (model.tokenizer.decode(i, skip_special_tokens=True) for i in (ids[0], out))
        assert before + text == whole


def test_one_prompt_alone(bridge: Any) -> None:
    text, chat = "the film was", [{"role": "user", "content": "was the food bad ?"}]
    assert gr.generate(bridge, text, max_new_tokens=4) == gr.generate(bridge, [text], max_new_tokens=4)
    assert gr.generate(bridge, chat, max_new_tokens=4) == gr.generate(bridge, [chat], max_new_tokens=4)
    quality = gr.evaluate.generation_quality(bridge, text, [], max_new_tokens=4)
    assert quality["prompt"].tolist() == [text] and len(gr.evaluate.generation_quality(bridge, iter([text]), [])) == 1


def test_a_prompt_that_cannot_be_used_is_named(bridge: Any) -> None:
    with pytest.raises(RecordError, match="^prompt 2: ") as error:
        gr.generate(bridge, ["the film was", " "])
    assert error.value.number == 2


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", *SCOPES])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_equals_one_by_one(model: Any, hf: Any, scope: Any, batch_size: int) -> None:
    edits = [move if scope == "all" else move_only(scope, len(p.split())) for p in PROMPTS]
    wanted = [plain_greedy(hf, p, edit) for p, edit in zip(PROMPTS, edits, strict=True)]
    found = gr.generate(
        model,
        PROMPTS,
        lambda n: hooks(positions=scope, prompt_len=n),
        max_new_tokens=N_NEW,
        batch_size=batch_size,
    )
    assert found == wanted


def test_hooks_are_told_the_padded_length(model: Any) -> None:
    told: list[int] = []

    def make(prompt_len: int) -> Any:
        told.append(prompt_len)
        return []

    gr.generate(model, PROMPTS, make, max_new_tokens=1, batch_size=2)
    lengths = [len(p.split()) for p in PROMPTS]
    assert told == [max(lengths[:2]), max(lengths[2:])]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scope", ["all", *SCOPES])
def test_prompt_of_one_token(model: Any, hf: Any, scope: Any, told: bool) -> None:
    """Its only position must not be taken for a decoding step, nor a decoding step for it."""
    edit = move if scope == "all" else move_only(scope, 1)
    for prompt in ("soup", "food"):
        given = (lambda n: hooks(positions=scope, prompt_len=n)) if told else hooks(positions=scope)
        assert gr.generate(model, [prompt], given, max_new_tokens=N_NEW) == [plain_greedy(hf, prompt, edit)]


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_is_repeatable(model: Any) -> None:
    texts = [gr.generate(model, PROMPTS, temperature=2.0, seed=s, max_new_tokens=N_NEW) for s in (5, 5, 6)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sampling_leaves_the_global_random_state(model: Any) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    gr.generate(model, PROMPTS[:2], temperature=1.0, seed=5, max_new_tokens=4)
    gr.generate(model, PROMPTS[:2], max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_does_not_depend_on_the_global_random_state(model: Any) -> None:
    texts = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        texts.append(gr.generate(model, PROMPTS[:2], temperature=2.0, seed=5, max_new_tokens=N_NEW))
    assert texts[0] == texts[1]


def test_temperature_near_zero_is_greedy(model: Any, hf: Any) -> None:
    found = gr.generate(model, PROMPTS, hooks(), temperature=ALMOST_GREEDY, max_new_tokens=N_NEW)
    assert found == [plain_greedy(hf, p, move) for p in PROMPTS]


def test_batches_draw_different_samples(model: Any) -> None:
    """The same prompt many times gives different samples, wherever the batches are cut."""
    texts = gr.generate(model, [PROMPTS[0]] * 6, temperature=3.0, batch_size=2, max_new_tokens=N_NEW)
    assert len(set(texts)) == 6


def test_neighbouring_seeds_draw_different_samples(model: Any) -> None:
    texts = [
        gr.generate(model, [PROMPTS[0]] * 3, temperature=3.0, batch_size=1, seed=seed, max_new_tokens=N_NEW)
        for seed in range(3)
    ]
    assert len({text for group in texts for text in group}) == 9


def test_decoding_settings_of_the_checkpoint_are_not_mixed_in(hf: Any) -> None:
    """Some models come with a repetition penalty; greedy means the largest logit all the same."""
    model = tiny_model("bridge")
    model.original_model.generation_config.repetition_penalty = 5.0
    assert gr.generate(model, PROMPTS, max_new_tokens=N_NEW) == [plain_greedy(hf, p) for p in PROMPTS]


SETTINGS = [
    {"suppress_tokens": [13, 16, 4]},
    {"begin_suppress_tokens": [13, 16, 4]},
    {"min_new_tokens": N_NEW},
    {"bad_words_ids": [[13], [16], [4]]},
    {"encoder_repetition_penalty": 5.0},
    {"forced_eos_token_id": 4},
    {"max_time": 0.0},
    {"num_return_sequences": 3},
    {"stop_strings": ["e"]},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_other_settings_of_the_checkpoint_are_not_mixed_in(hf: Any, setting: dict[str, Any]) -> None:
    model = tiny_model("bridge")
    for name, value in setting.items():
        setattr(model.original_model.generation_config, name, value)
    assert gr.generate(model, PROMPTS, max_new_tokens=N_NEW) == [plain_greedy(hf, p) for p in PROMPTS]
    for name, value in setting.items():
        assert getattr(model.original_model.generation_config, name) == value  # the model has its own settings back


def test_every_end_of_text_id_of_the_checkpoint_ends_the_text(hf: Any) -> None:
    model = tiny_model("bridge")
    text = gr.generate(model, [PROMPTS[0]], max_new_tokens=N_NEW)[0]
    second = text.split()[1]
    end = tiny_tokenizer().convert_tokens_to_ids(second)
    model.original_model.generation_config.eos_token_id = [model.tokenizer.eos_token_id, end]
    stopped = gr.generate(model, [PROMPTS[0]], max_new_tokens=N_NEW)[0].split()
    assert stopped == text.split()[: text.split().index(second)]


# -- clean up ---------------------------------------------------------------------------------------------------------


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids_of(PROMPTS[0])]))


def test_hooks_are_gone_afterwards(model: Any) -> None:
    calls: list[int] = []

    def count(act: Tensor, hook: Any) -> None:
        calls.append(1)

    before = logits(model)
    gr.generate(model, [PROMPTS[0]], [*hooks(), (f"blocks.{LAYER}.hook_resid_post", count)], max_new_tokens=3)
    ran = len(calls)
    assert ran > 0
    assert torch.equal(logits(model), before)
    assert len(calls) == ran


@pytest.mark.parametrize("fails_at", [1, 3])
def test_hooks_are_gone_after_an_exception(model: Any, fails_at: int) -> None:
    calls: list[int] = []

    def fail(act: Tensor, hook: Any) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("stopped on purpose")

    before, state = logits(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        gr.generate(model, [PROMPTS[0]], [*hooks(), (f"blocks.{LAYER}.hook_resid_post", fail)], temperature=1.0)
    assert torch.equal(logits(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == fails_at


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["the film was", ""], {}, "prompt 2: the prompt is empty"),
        (["  "], {}, "prompt is empty"),
        ([[{"role": "user", "content": ""}]], {}, "prompt is empty"),
        (["the film was"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (["the film was"], {"temperature": -0.5}, "temperature=-0.5"),
        (["the film was"], {"batch_size": 0}, "batch_size=0"),
        (["the film was", "the " * 60], {"max_new_tokens": 5}, "60 tokens and max_new_tokens=5 are too many"),
        (["the film was"], {"batch_size": 0}, "batch_size=0"),
        (["the film was", "the " * 60], {"max_new_tokens": 5}, "context holds 64"),
        (["the film was", "the " * 64], {}, "64 tokens, and the model's context holds 64"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(model: Any, prompts: Any, options: Any, message: str) -> None:
    calls: list[int] = []

    def count(act: Tensor, hook: Any) -> None:
        calls.append(1)

    with pytest.raises(ValueError, match=message):
        gr.generate(model, prompts, [("hook_embed", count)], **options)
    assert not calls


def test_the_context_may_be_filled_to_the_end(model: Any, hf: Any) -> None:
    prompt = "the film was " * 20
    wanted = rest_of(prompt, greedy(hf, ids_of(prompt), 4))
    assert gr.generate(model, [prompt], max_new_tokens=4) == [wanted]


def test_unknown_hook_name_is_refused(model: Any) -> None:
    with pytest.raises(KeyError, match="blocks.9.hook_resid_post"):
        gr.generate(model, ["the film was"], gr.hooks.steer_hook(9, direction(), 1.0))
