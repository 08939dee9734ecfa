"""The adapter against lm-evaluation-harness' own Hugging Face model, and a local task against our own MC1."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.harness import _shortened
from tests.conftest import WORDS, tiny_hf, tiny_model, tiny_tokenizer
from tests.helpers.tokenizers import sentencepiece_like

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'grains-tl[evals]')")
HALF = Path(__file__).parents[2].parent / "shared/data/truthfulqa/truthfulqa_half.csv"
TASK = """
task: local_mc1
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{mc1_targets.choices}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DIRECTION = torch.linspace(-1, 1, 32)


def requests(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=a) for a in args]


def write_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    data = folder / "questions.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    (folder / "local_mc1.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return data


def run_task(folder: Path, model: Any) -> tuple[float, list[list[float]]]:
    """The task's accuracy and the log-likelihood of every choice."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with torch.random.fork_rng():  # lm-eval sets global seeds
        results = lm_eval.simple_evaluate(
            model=model, tasks=["local_mc1"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
    samples = sorted(results["samples"]["local_mc1"], key=lambda sample: sample["doc_id"])
    return results["results"]["local_mc1"]["acc,none"], [[r[0] for r in s["filtered_resps"]] for s in samples]


def row(question: str, choices: list[str]) -> dict[str, Any]:
    labels = [1] + [0] * (len(choices) - 1)
    targets = {"choices": choices, "labels": labels}
    return {"question": question, "mc1_targets": targets, "mc2_targets": targets}


@pytest.fixture
def local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a task, whose data set is cached there too."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_local_task_scores_as_our_own_mc1(local_task: Path, model: Any) -> None:
    adjectives, nouns = ("great", "awful", "good", "bad", "cold", "warm"), ("film", "food", "hotel", "soup", "room")
    rows = [
        row(f"was the {noun} {a} ?", [f"it was {b}", f"no {a} {noun}", "we liked it and they hated it"])
        for noun in nouns
        for a, b in pairwise(adjectives)
    ]
    path = write_task(local_task, rows)
    items = gr.records.load_benchmark("truthfulqa", path, prompt_format="qa").items
    accuracies = []
    for hooks in (None, gr.hooks.steer_hook(1, DIRECTION, 9.0)):
        accuracy, logprobs = run_task(local_task, gr.evaluate.harness.adapter(model, hooks))
        ours = gr.inference.score_choices(model, items, hooks)
        torch.testing.assert_close(torch.tensor(logprobs), ours, atol=1e-4, rtol=0)
        assert accuracy == pytest.approx(gr.inference.mc1(ours, items).mean().item(), abs=1e-4)
        accuracies.append(accuracy)
    assert accuracies[0] != accuracies[1]
    assert all(0 < a < 1 for a in accuracies)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """lm-evaluation-harness' own model class around the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=tiny_hf(), tokenizer=tiny_tokenizer(), batch_size=1, max_length=64, device="cpu")


def test_requests_are_answered_as_by_their_hugging_face_model(model: Any, theirs: Any) -> None:
    with gr.settings(max_tokens=50):
        ours = gr.evaluate.harness.adapter(model)
    asked = requests(
        ("the film was", " good and we liked it"),
        ("the film was ", "good"),
        ("", "the soup was cold"),
        ("the food was bad . " * 20, " we hated it"),
        ("it is", " one"),
    )
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    texts = requests(("the film was good and we liked it",), (" ".join(WORDS[3:] * 4),))
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-3)


def test_greedy_flag_is_true_for_what_the_model_writes(bridge: Any, hf: Any) -> None:
    with torch.no_grad():
        ids = torch.tensor([bridge.tokenizer("the film was")["input_ids"]])
        for _ in range(3):
            ids = torch.cat([ids, hf(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    text = " " + " ".join(WORDS[i] for i in ids[0, -3:].tolist())
    asked = requests(("the film was", text), ("the film was", text + " <pad>"))
    assert [greedy for _, greedy in gr.evaluate.harness.adapter(bridge).loglikelihood(asked)] == [
        True,
        False,
    ]


def test_generation_stops_where_the_task_says(model: Any) -> None:
    hooks = gr.hooks.steer_hook(1, DIRECTION, 9.0)
    prompts = ["the film was", "we liked the food but the room was cold . overall it"]
    ours = gr.evaluate.harness.adapter(model, hooks)
    whole = ours.generate_until(requests(*[(p, {"until": [], "max_gen_toks": 6}) for p in prompts]))
    assert whole == [gr.generate(model, [p], hooks, max_new_tokens=6)[0] for p in prompts]
    stop = whole[0].split()[2]
    cut = ours.generate_until(requests((prompts[0], {"until": [stop], "max_gen_toks": 6, "do_sample": False})))
    assert cut == [whole[0].split(stop)[0]]
    long = ours.generate_until(requests(("the food was bad . " * 30, {"until": "\n", "max_gen_toks": 4})))
    assert len(long[0].split()) <= 4
    with pytest.raises(ValueError, match="top_p"):
        ours.generate_until(requests((prompts[0], {"do_sample": True, "top_p": 0.9})))


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
def test_a_shortened_prompt_keeps_its_last_words(make: Any) -> None:
    model = tiny_model(tokenizer=make())
    prompt = "food was good and soup was bad " * 12 + "the film was"
    short = _shortened(model, prompt, 40)
    ids = model.tokenizer(short)["input_ids"]
    assert prompt.endswith(short) and 20 <= len(ids) <= 24  # a tokenizer may cut the first word anew
    assert gr.evaluate.harness.adapter(model).generate_until(
        requests((prompt, {"until": [], "max_gen_toks": 40}))
    ) == gr.generate(model, short, max_new_tokens=40)


def test_scopes_and_their_limits(bridge: Any) -> None:
    def scoped(batch: Any) -> Any:
        return gr.hooks.steer_hook(1, DIRECTION, 9.0, positions="generated", prompt_len=batch.prompt_len)

    items = [gr.MultipleChoice("the film was", (" good and we liked it", " bad and cold"), (True, False))]
    ours = gr.evaluate.harness.adapter(bridge, scoped)
    found = [logp for logp, _ in ours.loglikelihood(requests(*[("the film was", c) for c in items[0].choices]))]
    assert found == pytest.approx(gr.inference.score_choices(bridge, items, scoped)[0].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="generation_hooks"):
        ours.generate_until(requests(("the film was", {"max_gen_toks": 2})))
    two = gr.evaluate.harness.adapter(bridge, scoped, generation_hooks=lambda n: gr.hooks.steer_hook(1, DIRECTION, 9.0))
    steered = gr.generate(bridge, ["the film was"], gr.hooks.steer_hook(1, DIRECTION, 9.0), max_new_tokens=2)
    assert two.generate_until(requests(("the film was", {"max_gen_toks": 2}))) == steered


def test_chat_template_goes_through(bridge: Any) -> None:
    chat = [{"role": "user", "content": "was it good ?"}]
    ours = gr.evaluate.harness.adapter(bridge)
    assert ours.apply_chat_template(chat) == "question : was it good ? <eos> answer : "
    without = tiny_model("bridge", tokenizer=tiny_tokenizer(chat=False))
    assert gr.evaluate.harness.adapter(without).tokenizer_name


@pytest.mark.real
def test_truthfulqa_on_smollm2(smollm2: SimpleNamespace, local_task: Path) -> None:
    if not HALF.exists():
        pytest.skip(f"no {HALF}")
    questions = gr.records.load_benchmark("truthfulqa", HALF, prompt_format="qa", limit=8).items
    rows = []
    for item in questions:
        wrong = [c.strip() for c, label in zip(item.choices, item.labels, strict=True) if not label]
        text = str(item.prompt).removeprefix("Q: ").removesuffix("\nA:")
        rows.append(row(text, [item.choices[item.best].strip(), *wrong]))
    items = gr.records.load_benchmark("truthfulqa", write_task(local_task, rows), prompt_format="qa").items
    model = smollm2.hooked or smollm2.bridge
    direction = torch.linspace(-1, 1, int(model.cfg.d_model))
    for hooks in (None, gr.hooks.steer_hook(12, direction, 20.0)):
        accuracy, logprobs = run_task(local_task, gr.evaluate.harness.adapter(model, hooks))
        ours = gr.inference.score_choices(model, items, hooks)
        for found, expected, item in zip(logprobs, ours, items, strict=True):
            assert found == pytest.approx(expected[: len(item.choices)].tolist(), abs=1e-4)
        assert accuracy == pytest.approx(gr.inference.mc1(ours, items).mean().item(), abs=1e-4)
