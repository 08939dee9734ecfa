"""What steering costs while the model writes: against plain Hugging Face, greedy and sampled, and as a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.evaluate.generated import token_costs
from grains_tl.evaluate.generation_tables import generation_curve
from grains_tl.inference import Continuations
from grains_tl.inference.generation import continue_prompts
from tests.evaluate.test_sweep import vectors_of
from tests.helpers.oracles import edited, greedy, steered

PROMPTS = ["the film was", "the food in this hotel was very", "the", "we liked the soup and"]
N_NEW = 7


def plain_measures(hf: Any, prompt: list[int], new: list[int], edit: Any) -> dict[str, np.ndarray]:
    """KL, entropies and likelihoods at each generated token, from two plain runs over the whole text."""
    ids = torch.tensor([[*prompt, *new]])
    with torch.no_grad():
        base = hf(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        with edited(hf, 1, edit):
            moved = hf(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    target = torch.tensor(new)[:, None]
    return {
        "kl": (moved.exp() * (moved - base)).sum(-1).numpy(),
        "entropy": -(moved.exp() * moved).sum(-1).numpy(),
        "base_entropy": -(base.exp() * base).sum(-1).numpy(),
        "nll": -moved.gather(1, target)[:, 0].numpy(),
        "base_nll": -base.gather(1, target)[:, 0].numpy(),
        "agreement": (moved.argmax(-1) == base.argmax(-1)).double().numpy(),
    }


def edit_of(vectors: Any, alpha: float, positions: str, n: int) -> Any:
    push = alpha * vectors.resid_norms[1] * vectors.directions[1]

    def edit(act: Tensor) -> Tensor:
        place = torch.arange(act.shape[1])[None, :, None]
        where = {"all": place >= 0, "generated": place >= n, "prompt": place < n}[positions]
        return torch.where(where, steered(act, push, renorm=True), act)

    return edit


@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_greedy_costs_are_those_of_plain_runs(model: Any, hf: Any, positions: Any) -> None:
    """Ragged prompts in one batch, one of them a single token, against single rows of the plain model."""
    vectors = vectors_of()
    steering = vectors.steering(0.8, 1, positions=positions)
    table = gr.evaluate.generation_quality(model, PROMPTS, steering, max_new_tokens=N_NEW)
    continued = continue_prompts(model, PROMPTS, steering, max_new_tokens=N_NEW)
    found = token_costs(model, continued, steering)
    for i, one in enumerate(continued):
        edit = edit_of(vectors, 0.8, positions, len(one.prompt))
        assert one.new == greedy(hf, one.prompt, N_NEW, 1, edit)
        wanted = plain_measures(hf, one.prompt, one.new, edit)
        np.testing.assert_allclose(found[i], np.stack(list(wanted.values())), atol=2e-4)
        row = table.iloc[i]
        assert row["text"] == one.text(model) and row["n_tokens"] == len(one.new)
        assert row["kl"] == pytest.approx(wanted["kl"].mean(), abs=1e-4)
        assert row["kl_p95"] == pytest.approx(np.quantile(wanted["kl"], 0.95), abs=2e-4)
        assert row["perplexity"] == pytest.approx(np.exp(wanted["base_nll"].mean()), rel=1e-3)
        assert row["entropy"] == pytest.approx(wanted["entropy"].mean(), abs=1e-3)
        np.testing.assert_allclose(row["kl_by_token"], wanted["kl"], atol=2e-4)
        base = greedy(hf, one.prompt, N_NEW)
        own = plain_measures(hf, one.prompt, base, lambda act: act)
        assert row["base_n_tokens"] == len(base)
        assert row["base_perplexity"] == pytest.approx(np.exp(own["base_nll"].mean()), rel=1e-3)


def test_no_steering_costs_nothing(model: Any) -> None:
    table = gr.evaluate.generation_quality(model, PROMPTS, vectors_of().steering(0.0, 1), max_new_tokens=N_NEW)
    assert (table["kl"] == 0).all() and (table["text"] == table["base_text"]).all()
    assert (table["agreement"] == 1).all() and (table["entropy"] == table["base_entropy"]).all()


def test_samples_are_seeded_and_scored_as_drawn(model: Any, hf: Any) -> None:
    vectors = vectors_of()
    steering = vectors.steering(0.8, 1)
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "temperature": 1.0, "n_samples": 2, "seed": 3}
    table = gr.evaluate.generation_quality(model, PROMPTS, steering, **options)
    assert table["sample"].tolist() == [0] * 4 + [1] * 4 and table["prompt_number"].tolist() == [0, 1, 2, 3] * 2
    assert table["text"][:4].tolist() != table["text"][4:].tolist()
    again = gr.evaluate.generation_quality(model, PROMPTS, steering, **options)
    pd.testing.assert_frame_equal(table, again)
    samples = Continuations(PROMPTS, N_NEW, 1.0, 2, 3).of(model, steering)
    for sample, rows in enumerate(samples):
        for i, one in enumerate(rows):
            wanted = plain_measures(hf, one.prompt, one.new, edit_of(vectors, 0.8, "all", len(one.prompt)))
            row = table[(table["sample"] == sample) & (table["prompt_number"] == i)].iloc[0]
            np.testing.assert_allclose(row["kl_by_token"], wanted["kl"], atol=2e-4)


def test_batches_do_not_matter(model: Any) -> None:
    steering = vectors_of().steering(0.8, 1, positions="generated")
    continued = continue_prompts(model, PROMPTS, steering, max_new_tokens=N_NEW)
    with gr.settings(max_tokens=5):
        alone = token_costs(model, continued, steering)
    for a, b in zip(alone, token_costs(model, continued, steering), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_hooks_of_ones_own(model: Any) -> None:
    """Functions of the prompt's length, lists that treat all positions alike, and lists that do not."""
    vectors = vectors_of()
    steering = vectors.steering(0.8, 1, positions="generated")
    wanted = gr.evaluate.generation_quality(model, PROMPTS, steering, max_new_tokens=N_NEW)["kl"]
    found = gr.evaluate.generation_quality(model, PROMPTS, steering.for_prompt, max_new_tokens=N_NEW)["kl"]
    assert found.tolist() == wanted.tolist() and (found > 1e-3).any()
    everywhere = vectors.steering(0.8, 1)
    a, b = (
        gr.evaluate.generation_quality(model, PROMPTS, h, max_new_tokens=N_NEW)["kl"]
        for h in (everywhere, everywhere.hooks())
    )
    assert a.tolist() == b.tolist()
    far = vectors.steering(3.0, 1, positions="generated", operator="add")
    with pytest.raises(ValueError, match="token by token"):
        gr.evaluate.generation_quality(model, PROMPTS, far.hooks(), max_new_tokens=N_NEW)


# -- summaries --------------------------------------------------------------------------------------------------------


def made_up(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        kl = rng.exponential(0.1, 5 + i % 3)
        rows.append(
            {"prompt_number": i, "sample": 0, "kl_by_token": kl.tolist(), "n_tokens": len(kl), "base_n_tokens": 6,
             "entropy": 1.0, "base_entropy": 2.0, "perplexity": np.e**2, "base_perplexity": np.e, "words": 5.0,
             "base_words": 5.0, "repetition": 0.5, "base_repetition": 0.25, "distinct_1": 0.5, "base_distinct_1": 1.0,
             "distinct_2": 0.5, "base_distinct_2": 1.0, "degenerate": i % 2 == 0, "base_degenerate": False}
        )  # fmt: skip
    return pd.DataFrame(rows)


def test_a_summary_is_over_tokens_with_intervals_over_prompts() -> None:
    frame = made_up(40)
    tokens = np.concatenate(frame["kl_by_token"].to_list())
    found = gr.evaluate.summarize(frame).set_index("measure")
    assert found.loc["kl", "steered"] == pytest.approx(tokens.mean())
    assert found.loc["kl_p50", "steered"] == pytest.approx(np.median(tokens))
    assert found.loc["kl_p95", "steered"] == pytest.approx(np.quantile(tokens, 0.95))
    assert found.loc["entropy", "change"] == pytest.approx(-1) and found.loc["perplexity", "steered"] == pytest.approx(
        np.e**2
    )
    assert found.loc["repetition", ["low", "change", "high"]].tolist() == pytest.approx([0.25] * 3)
    assert found.loc["degenerate", "steered"] == 0.5 and (found["n"] == 40).all()
    assert (found["low"] <= found["change"] + 1e-12).all() and (found["change"] <= found["high"] + 1e-12).all()
    both = pd.concat([frame.assign(vector="a"), made_up(40, 1).assign(vector="b")], ignore_index=True)
    assert gr.evaluate.summarize(both).groupby("vector").size().tolist() == [len(found)] * 2


def test_the_interval_of_the_mean_covers() -> None:
    """Of 200 tables the 90 % interval holds the true mean KL about as often as it says."""
    hits = 0
    for seed in range(200):
        frame = made_up(25, seed)
        row = gr.evaluate.summarize(frame.iloc[:, :], level=0.9, seed=seed).set_index("measure").loc["kl"]
        hits += row["low"] <= 0.1 <= row["high"]
    assert 0.8 < hits / 200 < 0.97


def test_the_curve_counts_positions() -> None:
    frame = made_up(9)
    curve = generation_curve(frame)
    assert curve["position"].tolist() == list(range(1, 8)) and curve["n"].tolist() == [9] * 5 + [6, 3]
    assert curve["kl"][0] == pytest.approx(np.mean([kl[0] for kl in frame["kl_by_token"]]))
    figure = gr.plotting.plot_generation_kl(pd.concat([frame.assign(vector="a"), frame.assign(vector="b")]))
    assert len(figure.axes[0].lines) == 4
    with pytest.raises(ValueError, match="generation_quality"):
        gr.plotting.plot_generation_kl(pd.DataFrame({"kl": [1.0]}))


# -- as a budget ------------------------------------------------------------------------------------------------------


def test_costs_of_generated_texts_and_what_goes_on_from_them(model: Any, pairs: Any, tmp_path: Path) -> None:
    vectors = vectors_of()
    texts = Continuations(PROMPTS, N_NEW)
    alphas = [0.2, 0.4, 0.8]
    frame, costs = gr.evaluate.sweep_records(model, vectors, pairs, layers=[1], alphas=alphas, neutral=texts,
                                             checkpoint=tmp_path / "s.jsonl")  # fmt: skip
    assert costs is not None
    for alpha, rows in costs.groupby("alpha"):
        table = gr.evaluate.generation_quality(model, PROMPTS, vectors.steering(alpha, 1), max_new_tokens=N_NEW)
        np.testing.assert_allclose(rows["kl"], table["kl"], atol=1e-6)
        assert rows["n_tokens"].tolist() == table["n_tokens"].tolist()
    _, same = gr.evaluate.sweep_records(model, vectors, pairs, layers=[1], alphas=alphas, neutral=texts,
                                            checkpoint=tmp_path / "s.jsonl")  # fmt: skip
    pd.testing.assert_frame_equal(costs, same)
    # a quantile comes from the same results, and is that of the tokens
    settings, upper = gr.evaluate.grid(vectors, [1], alphas), Continuations(PROMPTS, N_NEW, quantile=0.95)
    high = gr.evaluate.text_costs(model, settings, upper, checkpoint=tmp_path / "s.jsonl")
    assert costs is not None
    assert (high["kl"] >= costs["kl"] - 1e-9).all() and "95 %" in high["budget"][0]
    table = gr.evaluate.generation_quality(model, PROMPTS, vectors.steering(0.8, 1), max_new_tokens=N_NEW)
    np.testing.assert_allclose(high[high["alpha"] == 0.8]["kl"], table["kl_p95"], atol=1e-6)
    at = gr.evaluate.effect_at_kl(frame, costs, kl=float(costs[costs["alpha"] == 0.4]["kl"].mean()) / 2)
    assert 0 < at["alpha"][0] < 0.8 and np.isfinite(at["effect"][0])
    summary = gr.evaluate.summarize(frame, costs)
    weights = costs[costs["alpha"] == 0.4]
    assert summary.set_index("alpha")["kl"][0.4] == pytest.approx(
        np.average(weights["kl"], weights=weights["n_tokens"])
    )
    chosen = gr.choose(summary, max_kl=10.0, budget="generated")
    assert "generated tokens" in chosen.why
    with pytest.raises(ValueError, match="generated"):
        gr.choose(summary, max_kl=10.0, budget="neutral")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.5}, "quantile"),
        ({"n_samples": 3}, "greedy"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_continuations_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Continuations(**{"prompts": PROMPTS, **options})


def test_neutral_costs_are_no_generated_budget() -> None:
    frame = pd.DataFrame({"vector": "v", "positions": "all", "layer": [3], "alpha": 0.2, "effect": 1.0, "kl": 0.1})
    frame.attrs["records"] = ["a"]
    with pytest.raises(ValueError, match="Continuations"):
        gr.choose(frame, max_kl=1.0, budget="generated")
