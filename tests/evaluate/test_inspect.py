"""Inspect AI runs a local eval on a steered model (skipped where inspect-ai is not installed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from tests.conftest import tiny_hf, tiny_tokenizer

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (pip install 'grains-tl[inspect]')")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    raw = torch.linspace(-1, 1, 32).repeat(3, 1)
    vectors = gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 10.0), {"method": "test"})
    vectors.steering(0.9, 1, operator="add").save(tmp_path / "chosen.safetensors")
    return tmp_path


def ask(folder: Path, steering: gr.Steering | None, questions: list[str], limit: int) -> list[str]:
    model = gr.load_model(str(folder))
    return [
        gr.generate(model, [[{"role": "user", "content": q}]], steering, max_new_tokens=limit)[0] for q in questions
    ]


def test_a_local_eval(folder: Path) -> None:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match

    import grains_tl.evaluate.inspect_provider  # noqa: F401 (an installed package is found by its entry point)

    questions = ["was the film good ?", "was the soup cold ?", "we liked the hotel"]
    chosen = gr.load_vectors(folder / "chosen.safetensors").chosen
    for given, steering in (({}, None), ({"vectors": str(folder / "chosen.safetensors")}, chosen)):
        answers = ask(folder, steering, questions, 5)
        targets = [answers[0], answers[1], "nothing of the kind"]
        task = Task(
            dataset=[Sample(input=q, target=t) for q, t in zip(questions, targets, strict=True)], scorer=match("exact")
        )
        model = get_model(f"grains_tl/{folder}", config=GenerateConfig(max_tokens=5), memoize=False, **given)
        (log,) = eval(task, model=model, log_dir=str(folder / "logs"), display="none")
        assert log.status == "success", log.error
        found = [sample.output.completion for sample in sorted(log.samples, key=lambda s: s.id)]
        assert found == answers
        assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(2 / 3)
        assert log.samples[0].output.usage.output_tokens > 0
    assert ask(folder, None, questions, 5) != ask(folder, chosen, questions, 5)


def test_what_it_cannot_do_is_said(folder: Path) -> None:
    import asyncio

    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig
    from inspect_ai.tool import ToolInfo

    from grains_tl.evaluate.inspect_provider import register

    provider: Any = register()(str(folder))

    def call(content: Any, tools: list[Any] | None = None, **config: Any) -> Any:
        asked = provider.generate([ChatMessageUser(content=content)], tools or [], "auto", GenerateConfig(**config))
        return asyncio.run(asked)

    with pytest.raises(ValueError, match="tools"):
        call("was it good ?", [ToolInfo(name="search", description="x")])
    with pytest.raises(ValueError, match="logprobs"):
        call("was it good ?", logprobs=True)
    with pytest.raises(ValueError, match="image"):
        call([ContentText(text="what is it ?"), ContentImage(image="data:image/png;base64,AAAA")])
    whole = call("was it good ?", max_tokens=6).completion
    stop = whole.split()[2]
    assert call("was it good ?", max_tokens=6, stop_seqs=[stop]).completion == whole.partition(stop)[0]
    assert call([ContentText(text="was it good ?")], max_tokens=6).completion == whole
