"""What a newcomer gets wrong first: names, types and the order of arguments."""

from __future__ import annotations

from typing import Any

import pytest

import grains_tl as gr
from grains_tl.models import loading
from grains_tl.models.naming import KNOWN


@pytest.mark.parametrize(
    ("name", "said"), [("smolm2", "did you mean 'smollm2'"), ("no-such-model", "expected 'smollm2'")]
)
def test_a_model_that_is_not_there(name: str, said: str) -> None:
    """transformers said that there is no connection, whatever the name."""
    with pytest.raises(OSError, match=said) as refused:
        gr.load_model(name)
    assert repr(name) in str(refused.value) and "folder" in str(refused.value)


def test_the_names_that_are_offered_are_known() -> None:
    assert {"smollm2", loading.TINY_VLM, loading.SCENES_VLM, *loading.IN_WHEELS} == set(KNOWN)


@pytest.mark.parametrize("dtype", ["fp16", "float32", 16])
def test_a_dtype_by_its_name(unchecked: None, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a torch dtype such as torch\.float32"):
        gr.load_model("tiny-vlm", dtype=dtype)


@pytest.mark.parametrize(("given", "meant"), [("topk", "top_k"), ("read_out", "readout"), ("n_step", "n_steps")])
def test_a_misspelt_option(bridge: Any, pairs: Any, given: str, meant: str) -> None:
    """It named the options of leave-one-out, which has none of these."""
    options: dict[str, Any] = {given: 2}
    with pytest.raises(ValueError, match=f"{given}; did you mean {meant}"):
        gr.build_vectors(bridge, pairs, **options)


def test_options_of_another_method_are_still_the_methods_affair(bridge: Any, pairs: Any) -> None:
    with pytest.raises(ValueError, match="'leave_one_out' takes no layer"):
        gr.build_vectors(bridge, pairs, layer=2)


@pytest.mark.parametrize(
    ("model", "said"), [("smollm2", r"gr\.load_model\('smollm2'\)"), ([], "model comes first"), (3, "wrap_model")]
)
def test_something_else_than_a_model(unchecked: None, pairs: Any, model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gr.build_vectors(model, pairs)
