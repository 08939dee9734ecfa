"""Which errors a fast path may hide: a model's own, and none of this package's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl._util.errors import MODEL_ERRORS, require_from_outside
from grains_tl.attribution.sharing import shares_prompts
from grains_tl.inference import restart

WRONG = {
    "python": "raise TypeError('no such argument')",
    "torch in C": "torch.ones(2) @ torch.ones(3)",
    "torch in Python": "torch.nn.functional.cross_entropy(torch.ones(2, 3), torch.ones(4).long())",
    "index": "[][1]",
}


def code_of(package: str, line: str) -> Callable[[], Any]:
    names: dict[str, Any] = {"__name__": f"{package}.somewhere", "torch": torch}
    exec(f"def run():\n    {line}", names)
    return names["run"]  # type: ignore[no-any-return]


def tried(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except MODEL_ERRORS as error:
        require_from_outside(error)
        return None


# Was a bug: a wrong shape in the package's own lines was taken for an architecture that does not take shared rows.
@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_own_mistakes_are_not_hidden(line: str) -> None:
    with pytest.raises(MODEL_ERRORS):
        tried(code_of("grains_tl.attribution", line))
    for package in ("transformers.models.llama", "transformer_lens", "transformers_modules.remote"):
        assert tried(code_of(package, line)) is None


def test_a_model_may_refuse_a_keyword() -> None:
    """Python raises this in the line of the caller, which is ours."""
    assert tried(code_of("grains_tl.inference", "(lambda ids: ids)(1, position_ids=2)")) is None


def test_out_of_memory_is_not_hidden() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        tried(code_of("transformers", "raise torch.OutOfMemoryError('CUDA out of memory')"))


def test_a_mistake_in_shared_rows_is_seen(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grains_tl.attribution import sharing

    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    broken = code_of("grains_tl.attribution", "torch.ones(2) @ torch.ones(3)")
    monkeypatch.setattr(sharing, "_sees", lambda *_: broken())
    with pytest.raises(RuntimeError):
        shares_prompts(bridge, tokenized, "sum")


def test_a_mistake_in_a_restart_is_seen(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = code_of("grains_tl.inference", "torch.ones(2) @ torch.ones(3)")
    monkeypatch.setattr(restart, "_edited", lambda *_: broken())
    with pytest.raises(RuntimeError):
        gr.evaluate.measure(bridge, pairs, [gr.evaluate.Setting(0, [])])
