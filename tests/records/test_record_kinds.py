"""Every public function that measures records takes them tokenized or not, and says so when it gets something else."""

# mypy: disable-error-code="arg-type, list-item"
# values of the wrong type are what half of this file is about
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.tokens.pairs import as_tokenized

LAYERS, NORMS = [1, 2], torch.tensor([5.0, 6.0])
#: Name -> a call with the model, the records, and what was made of them beforehand.
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "attribute_all": lambda m, r, _: gr.attribution.attribute_all(m, r),
    "prompt_weights": lambda m, r, _: [
        torch.tensor(w) for w in cast("Any", gr.attribution.prompt_weights(m, r).weights).values()
    ],
    "score_pairs": lambda m, r, made: gr.score_pairs(m, r, made.vectors.hooks(0.2, [1])),
    "measure": lambda m, r, made: gr.evaluate.measure(m, r, [gr.evaluate.Setting(1, made.vectors.hooks(0.2, [1]))]),
    "next_token_kl": lambda m, r, made: gr.evaluate.next_token_kl(m, r, made.vectors.hooks(0.2, [1])),
    "curves": lambda m, r, made: gr.faithfulness.curves(m, r, made.attributions),
    "read_out": lambda m, r, _: gr.vectors.read_out(m, r, layers=LAYERS),
    "collect_differences": lambda m, r, made: gr.vectors.collect_differences(m, r, made.selections, layers=LAYERS),
    "caa_differences": lambda m, r, _: gr.baselines.caa_differences(m, r, layers=LAYERS, resid_norms=NORMS),
    "random_token_differences": lambda m, r, made: gr.baselines.random_token_differences(
        m, r, made.selections, layers=LAYERS, resid_norms=NORMS, n_draws=2
    ),
    "compare_with_controls": lambda m, r, made: gr.compare_with_controls(
        m, r, r, {"v": made.single}, {"v": [made.single] * 2}, name="v", alpha=0.2, n_test_draws=2
    ),
    "patch": lambda m, r, made: gr.analysis.patch(m, r, made.vectors.hooks(0.2, [1])),
    "mechanism": lambda m, r, made: gr.analysis.mechanism(m, made.single.steering(0.2, 1), r, n_random=0),
    "steering_circuit": lambda m, r, made: gr.analysis.steering_circuit(
        m, made.single.steering(0.2, 1), r, n_steps=1, n_random=0
    ),
    "circuit_faithfulness": lambda m, r, made: gr.analysis.circuit_faithfulness(
        m, made.single.steering(0.2, 1), r, made.circuit, sizes=[0, 2], n_random=0
    ),
    "sparsity_curve": lambda m, r, made: gr.analysis.sparsity_curve(
        m, made.single.steering(0.2, 1), r, shares=[0.5], n_random=0, texts=["the film was good and warm"]
    ),
    "residuals": lambda m, r, _: gr.analysis.residuals(m, r, layers=LAYERS, readout="response_end"),
    "writers": lambda m, r, made: gr.analysis.writers(m, r, made.vectors, layer=2),
    "ablation_table": lambda m, r, made: gr.analysis.ablation_table(m, r, made.vectors, n_random=1),
}


class Made:
    """What the calls need besides records."""

    def __init__(self, model: Any, pairs: Any) -> None:
        tokenized = gr.tokens.tokenize_pairs(model, pairs)
        self.attributions = gr.attribution.attribute_all(model, tokenized)
        self.selections = [gr.attribution.select_tokens(a, top_k=1) for a in self.attributions]
        self.vectors = gr.vectors.reduce_vectors(
            gr.vectors.collect_differences(model, tokenized, self.selections, layers=LAYERS)
        )
        self.single = self.vectors.at([1])
        nodes = [("head", 2, head) for head in range(4)] + [("MLP", 2, -1)]
        self.circuit = pd.DataFrame(nodes, columns=["part", "layer", "head"]).assign(vector="steering", score=1.0)
        self.circuit["rank"] = range(1, len(nodes) + 1)


def parts(result: Any) -> list[Any]:
    """Tensors and plain values of a result, to compare one by one."""
    if isinstance(result, pd.DataFrame):
        return [list(result.columns), torch.tensor(result.select_dtypes("number").to_numpy(dtype=float))]
    if isinstance(result, (list, tuple)):
        return [x for item in result for x in parts(item)]
    if isinstance(result, dict):
        return [x for key, value in result.items() for x in (key, *parts(value))]
    if hasattr(result, "__dataclass_fields__"):
        return parts([getattr(result, name) for name in result.__dataclass_fields__])
    return [result]


@pytest.mark.parametrize("name", CALLS)
def test_pairs_give_what_tokenized_records_give(model: Any, pairs: list[gr.PreferencePair], name: str) -> None:
    made = Made(model, pairs)
    given, expected = (parts(CALLS[name](model, r, made)) for r in (pairs, gr.tokens.tokenize_pairs(model, pairs)))
    assert len(given) == len(expected) and any(isinstance(x, torch.Tensor) and x.numel() for x in expected)
    for one, other in zip(given, expected, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def test_no_function_is_left_out() -> None:
    names = set()
    for room in (
        gr,
        *(gr.analysis, gr.attribution, gr.baselines, gr.evaluate, gr.faithfulness, gr.inference, gr.vectors),
    ):
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isfunction(thing):
                shape = list(inspect.signature(thing).parameters.values())
                taken = [p for p in shape if "TokenizedPair" in str(p.annotation) or str(p.annotation) == "Records"]
                if taken and shape[0].name == "model":
                    names.add(name)
    assert names == set(CALLS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CALLS)
def test_one_record_is_refused(bridge: Any, pairs: list[gr.PreferencePair], name: str) -> None:
    made = Made(bridge, pairs)
    for single in (pairs[0], gr.tokens.tokenize_pairs(bridge, pairs)[0]):
        with pytest.raises(
            ValueError, match=r"records are a \w+Pair; expected a list of PreferencePair .* \[record\] for one"
        ):
            CALLS[name](bridge, single, made)


@pytest.mark.usefixtures("unchecked")
def test_wrong_kinds_are_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    assert as_tokenized(bridge, tokenized) == tokenized == as_tokenized(bridge, iter(pairs))
    for wrong, words in [
        ("pairs.jsonl", r"records are a str; .*load_pairs"),
        (3, r"records are a int; expected a list"),
        ({"prompt": "a"}, r"records are a dict; expected a list"),
        ([{"prompt": "a", "chosen": " b", "rejected": 3}], r"record 1: rejected is 3, a int"),
        ([tokenized[0], pairs[1]], r"record 2 is a PreferencePair among TokenizedPair; .* all of one kind"),
        ([pairs[0], tokenized[1]], r"record 1 is a PreferencePair among TokenizedPair; .* all of one kind"),
    ]:
        with pytest.raises(ValueError, match=words):
            as_tokenized(bridge, wrong)
