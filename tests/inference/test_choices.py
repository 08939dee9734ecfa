"""Likelihoods of choices against a loop over the plain Hugging Face model; MC1 and MC2 against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.inference.choices import choice_batches, tokenize_choices
from grains_tl.inference.restart import prepare_restart, restart_logprobs
from tests.conftest import tiny_model


def items() -> list[gr.MultipleChoice]:
    return [
        gr.MultipleChoice("question : was the food bad ? answer :", (" yes", " no", " very bad"), (False, True, True)),
        gr.MultipleChoice("the film was", (" good and we liked it", " awful", " good"), (True, False, False)),
        gr.MultipleChoice([{"role": "user", "content": "the soup was"}], ("cold", "not warm"), (True, False)),
        gr.MultipleChoice("it is", (" one", " two", " three", " four"), (False, False, True, False)),
    ]


def by_loop(hf: Any, tokenizer: Any, item: gr.MultipleChoice, hook: Any = None) -> list[float]:
    """One unpadded run per choice; torch's own hook on the second block."""
    found = []
    for choice in item.choices:
        if isinstance(item.prompt, str):
            prompt = tokenizer(item.prompt)["input_ids"]
            answer = tokenizer(choice)["input_ids"]
        else:
            text = tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True)
            prompt, answer = tokenizer(text)["input_ids"], tokenizer(choice)["input_ids"]
        handle = hf.model.layers[1].register_forward_hook(hook) if hook else None
        with torch.no_grad():
            logp = hf(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        if handle:
            handle.remove()
        found.append(sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    return found


@pytest.mark.parametrize("max_tokens", [1, 40, 512])
def test_likelihoods_equal_a_loop_over_the_hugging_face_model(model: Any, hf: Any, max_tokens: int) -> None:
    direction = torch.linspace(-1, 1, 32)
    hooks = gr.hooks.steer_hook(1, direction, 3.0, operator="add")

    def add(module: Any, args: Any, out: Any) -> Any:
        moved = (out[0] if isinstance(out, tuple) else out) + 3.0 * direction / direction.norm()
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    for fwd_hooks, hook in ((None, None), (hooks, add)):
        with gr.settings(max_tokens=max_tokens):
            scores = gr.inference.score_choices(model, items(), fwd_hooks)
        assert scores.shape == (4, 4)
        for row, item in zip(scores, items(), strict=True):
            n = len(item.choices)
            assert row[:n].tolist() == pytest.approx(by_loop(hf, model.tokenizer, item, hook), abs=2e-5)
            assert bool((row[n:] == -torch.inf).all())


def test_scores_equal_those_of_the_pair(bridge: Any) -> None:
    scores = gr.inference.score_choices(bridge, items())
    pairs = gr.score_pairs(bridge, gr.tokens.tokenize_pairs(bridge, [item.pair() for item in items()]))
    for row, item, pair in zip(scores, items(), pairs, strict=True):
        assert [row[item.best].item(), row[item.labels.index(False)].item()] == pytest.approx(pair.tolist(), abs=1e-5)


def test_scopes_know_where_the_prompt_ends(bridge: Any) -> None:
    direction = torch.linspace(-1, 1, 32)
    last = gr.inference.score_choices(
        bridge, items(), lambda b: gr.hooks.steer_hook(2, direction, 9.0, positions="last", prompt_len=b.prompt_len)
    )
    everywhere = gr.inference.score_choices(bridge, items(), gr.hooks.steer_hook(2, direction, 9.0))
    torch.testing.assert_close(last, everywhere)  # after the last block nothing else can see the prompt


def test_letters_share_one_row(bridge: Any) -> None:
    tokenized = tokenize_choices(bridge, items())
    assert [len(t.rows[0]) for t in tokenized] == [1, 1, 1, 1]  # one input is always the beginning of the longest
    assert (
        len(tokenize_choices(bridge, [gr.MultipleChoice("it is", (" one two", " two one"), (True, False))])[0].rows[0])
        == 2
    )


def test_batches_restart_from_a_cached_residual(model: Any) -> None:
    hooks = gr.hooks.steer_hook(1, torch.linspace(-1, 1, 32), 5.0)
    expected = gr.inference.score_choices(model, items(), hooks)
    with gr.settings(max_tokens=40):
        for slots, batch in choice_batches(model, tokenize_choices(model, items())):
            again = restart_logprobs(model, prepare_restart(model, batch, [1]), 1, hooks).flatten()
            for (item, choice), logprob in zip(slots, again, strict=False):
                assert logprob.item() == pytest.approx(expected[item, choice].item(), abs=1e-4)


def test_mc1_and_mc2_by_hand() -> None:
    two_right = gr.MultipleChoice("q", (" a", " b", " c", " d"), (True, True, False, False))
    one_right = gr.MultipleChoice("q", (" x", " y"), (False, True))
    table = [two_right, two_right, one_right, one_right]
    scores = torch.tensor(
        [
            [-1.0, -5.0, -2.0, -3.0],
            [-3.0, -1.0, -2.0, -9.0],
            [-1.0, -1.0, -torch.inf, -torch.inf],
            [-7.0, -4.0, 0.0, 0.0],
        ]
    )
    assert gr.inference.mc1(scores, table).tolist() == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]  # a tie is not won; another right answer does not count
    e = torch.tensor(scores.tolist(), dtype=torch.float64).exp()
    by_hand: list[Any] = [
        (e[0, 0] + e[0, 1]) / e[0].sum(),
        (e[1, 0] + e[1, 1]) / e[1].sum(),
        0.5,
        e[3, 1] / (e[3, 0] + e[3, 1]),
    ]
    assert gr.inference.mc2(scores, table).tolist() == pytest.approx([float(x) for x in by_hand])
    assert gr.inference.binary_accuracy(scores, table).tolist() == [1.0, 0.0, 0.0, 1.0]
    far = scores - 1e4  # likelihoods that underflow
    assert gr.inference.mc2(far, table).tolist() == pytest.approx([float(x) for x in by_hand], abs=1e-3)


def test_scores_must_belong_to_the_questions() -> None:
    item = gr.MultipleChoice("q", (" a", " b", " c"), (True, False, False))
    with pytest.raises(ValueError, match="1 questions of up to 3 choices"):
        gr.inference.mc1(torch.zeros(1, 2), [item])
    with pytest.raises(ValueError, match="0 questions"):
        gr.inference.mc2(torch.zeros(1, 2), [])
    with pytest.raises(ValueError, match="question 1 has NaN or infinite scores"):
        gr.inference.mc2(torch.tensor([[0.0, torch.nan, 1.0]]), [item])


@pytest.mark.parametrize(
    ("prompt", "choices", "labels", "message"),
    [
        (" ", (" a", " b"), (True, False), "prompt is empty"),
        ("q", (" a",), (True,), "at least two choices"),
        ("q", (" a", " b"), (True,), "1 labels"),
        ("q", (" a", " "), (True, False), "choice is empty"),
        ("q", (" a", " b", " b"), (True, False, False), "appears twice"),
        ("q", (" a", " a"), (True, False), "another wrong one"),
        ("q", (" a", " b"), (True, True), "at least one right choice and another wrong"),
        ("q", (" a", " b"), (False, False), "at least one right choice and another wrong"),
    ],
)
def test_bad_questions_are_refused(prompt: str, choices: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gr.MultipleChoice(prompt, choices, labels)


def test_the_message_names_the_question(bridge: Any) -> None:
    long = gr.MultipleChoice("the film was " * 30, (" good", " bad"), (True, False))
    with pytest.raises(ValueError, match="question 2: prompt \\+ response 1 is 91 tokens"):
        gr.inference.score_choices(bridge, [items()[0], long])
    with pytest.raises(ValueError, match="no questions"):
        gr.inference.score_choices(bridge, [])


def test_response_logprobs_sum_to_the_score(model: Any) -> None:
    pair = gr.PreferencePair("the film was", " good and we liked it", " awful")
    hooks = gr.hooks.steer_hook(1, torch.linspace(-1, 1, 32), 5.0)
    frame = gr.inference.response_logprobs(model, pair.prompt, " good and we liked it", hooks)
    assert list(frame.token) == ["good", "and", "we", "liked", "it"]
    tokenized = gr.tokens.tokenize_pairs(model, [pair])
    assert frame.before.sum() == pytest.approx(gr.score_pairs(model, tokenized)[0, 0].item(), abs=1e-5)
    assert frame.after.sum() == pytest.approx(gr.score_pairs(model, tokenized, hooks)[0, 0].item(), abs=1e-5)


def test_a_two_layer_gpt2_too() -> None:
    model = tiny_model("bridge", "gpt2")
    with gr.settings(max_tokens=30):
        scores = gr.inference.score_choices(model, items())
    pairs = gr.score_pairs(model, gr.tokens.tokenize_pairs(model, [item.pair() for item in items()]))
    assert scores[1, 0].item() == pytest.approx(pairs[1, 0].item(), abs=1e-5)
