"""Probes and ablation: scikit-learn, explicit projections and theorems as oracles, in planted and random models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import grains_tl as gr
from grains_tl import analysis
from grains_tl.analysis.ablation import span
from grains_tl.analysis.logistic import fit_logistic
from tests.conftest import KINDS
from tests.helpers.oracles import edited, residuals, steered
from tests.helpers.planted import COPY, axis, planted_model, planted_pairs

ATOL = 2e-4  # nats and residual units of size 10, float32 through two implementations


def random_vectors(layers: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(len(layers), 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, layers, torch.full((len(layers),), 6.0))


def features(n: int = 30, shift: float = 0.0, d_model: int = 12) -> torch.Tensor:
    x = torch.randn(n, 2, 2, d_model, generator=torch.Generator().manual_seed(0))
    x[:, 0, :, 3] += shift
    return x


# -- probes -----------------------------------------------------------------------------------------------------------


def test_noise_gives_chance_and_a_shift_is_found() -> None:
    noise = analysis.fit_probes(features(n=60), [4, 5], n_shuffles=5)
    assert noise.frame.accuracy.between(0.3, 0.7).all() and noise.frame.selectivity.abs().max() < 0.2
    found = analysis.fit_probes(features(shift=4.0), [4, 5], n_shuffles=5)
    assert found.frame.accuracy.min() > 0.9 and found.frame.floor.between(0.3, 0.7).all()
    np.testing.assert_allclose(found.frame.selectivity, found.frame.accuracy - found.frame.floor)
    assert found.directions[:, 3].min() > 0.8 and found.patterns[:, 3].min() > 0.9
    assert found.layers == (4, 5) and found.frame.n.tolist() == [30, 30]


def test_accuracy_and_direction_are_scikit_learns() -> None:
    x = features(shift=1.0)
    found = analysis.fit_probes(x, [4, 5], n_folds=30, n_shuffles=0)  # one record a fold: no draw of folds matters
    flat, y = x[:, :, 1].reshape(60, -1).double().numpy(), np.tile([1, 0], 30)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-10))
    scores = cross_val_score(oracle, flat, y, groups=np.repeat(np.arange(30), 2), cv=GroupKFold(30))
    assert found.frame.accuracy[1] == pytest.approx(scores.mean())
    assert found.frame.se[1] == pytest.approx(scores.std(ddof=1) / 30**0.5)
    gradient = oracle.fit(flat, y)[-1].coef_[0] / oracle[0].scale_
    np.testing.assert_allclose(found.directions[1], gradient / np.linalg.norm(gradient), atol=1e-5)
    assert np.isnan(found.frame.floor).all()


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_many_labels_at_once_are_scikit_learns_one_by_one(shape: tuple[int, int], strength: float) -> None:
    """More rows than features and fewer; a constant feature; features of very different size and far from zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-2, 4, shape[1]) + 5.0
    x[:, 0] = 3.0
    labels = rng.random((4, shape[0])) < 0.4
    found = fit_logistic(x, labels, strength)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=10_000, tol=1e-10))
    for label, logits in zip(labels, found.logits(x), strict=True):
        np.testing.assert_allclose(logits, oracle.fit(x, label).decision_function(x), atol=2e-4, rtol=1e-4)


def test_labels_far_apart_in_difficulty_are_fitted_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One label is told apart safely, the others are coins; features of real spread."""
    import scipy.optimize

    evaluations: list[int] = []
    minimise = scipy.optimize.minimize

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = minimise(*args, **kwargs)
        evaluations.append(found.nfev)
        return found

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 200)) @ (rng.normal(size=(200, 200)) * np.logspace(1.5, -1.5, 200))
    labels = np.concatenate([(x[:, :1] > 0).T, rng.random((4, 120)) < 0.5])
    monkeypatch.setattr(scipy.optimize, "minimize", counted)
    found = fit_logistic(x, labels, 1.0, tolerance=1e-4)
    assert len(evaluations) == 2 and sum(evaluations) < 150
    exact = fit_logistic(x, labels, 1.0)
    np.testing.assert_allclose(found.logits(x), exact.logits(x), atol=0.02)


def test_mass_means_find_a_planted_direction_that_the_probe_tilts_away_from() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.cat([torch.full((6,), 6.0), torch.ones(26)])  # directions of large variance
    x = torch.randn(400, 2, 1, 32, generator=generator) * wide
    planted = torch.nn.functional.normalize(torch.ones(32), dim=0)
    x[:, 0] += 12 * planted
    x[:, 1] -= x[:, 1].mean(0) - (x[:, 0].mean(0) - 12 * planted)  # nothing else tells the sides apart
    found = analysis.fit_probes(x, [3], n_shuffles=0)
    assert float(found.mass_means[0] @ planted) > 0.999 > float(found.directions[0] @ planted) + 0.05
    v = gr.SteeringVectors.from_raw(found.mass_means, found.layers, torch.ones(1))
    again = analysis.fit_probes(x, [3], n_shuffles=0, vectors=v).frame
    assert again.cosine_mass_mean.item() == pytest.approx(1.0, abs=1e-6)


def test_sides_of_one_record_stay_together() -> None:
    """Records are clusters and the label says nothing: a probe that saw the other side of a record would win or lose big."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 1, 30, generator=generator).expand(-1, 2, -1, -1).clone()
    x += 1e-3 * torch.randn(x.shape, generator=generator)
    assert analysis.fit_probes(x, [0], n_shuffles=0).frame.accuracy.item() == pytest.approx(0.5, abs=0.15)


def test_cosines_to_vectors() -> None:
    v = gr.SteeringVectors.from_raw(torch.eye(12)[[3]], [5], torch.ones(1))
    found = analysis.fit_probes(features(shift=4.0), [4, 5], n_shuffles=0, vectors=v)
    assert np.isnan(found.frame.cosine[0])
    assert found.frame.cosine[1] == pytest.approx(float(found.directions[1, 3]), abs=1e-6)
    assert found.frame.cosine_pattern[1] == pytest.approx(float(found.patterns[1, 3]), abs=1e-6)


def test_residuals_are_those_of_a_plain_steered_run(model: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """Both read-outs, with a user's steering below the hooks that read."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    vectors = random_vectors()
    step = 0.5 * 6.0 * vectors.directions[1]
    found = analysis.residuals(model, tokenized, readout="response_end", fwd_hooks=vectors.hooks(0.5, [1]))
    plain = analysis.residuals(model, tokenized, layers=[2], readout="response_end")
    for i, t in enumerate(tokenized):
        for side, response in enumerate((t.chosen, t.rejected)):
            ids = t.prompt + response
            torch.testing.assert_close(plain[i, side, 0], residuals(hf, ids)[2, -1], atol=ATOL, rtol=0)
            with edited(hf, 1, lambda act: steered(act, step, renorm=True)):
                wanted = residuals(hf, ids)[[0, 2], -1]  # at layer 1 the oracle's own order of hooks would matter
            torch.testing.assert_close(found[i, side, [0, 2]], wanted, atol=ATOL, rtol=0)
            at_layer = steered(residuals(hf, ids)[1, -1], step, renorm=True)
            torch.testing.assert_close(found[i, side, 1], at_layer, atol=ATOL, rtol=0)
    selections = [gr.attribution.Selection((1,), (2,)) for _ in pairs]
    ends = analysis.residuals(model, tokenized, selections=selections)
    without = gr.vectors.collect_differences(model, tokenized, selections)
    torch.testing.assert_close(
        ends[:, 0] - ends[:, 1], without.toward_chosen - without.toward_rejected, atol=ATOL, rtol=0
    )
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_separation_by_hand_and_under_a_shift() -> None:
    x = features(shift=1.0)
    v = gr.SteeringVectors.from_raw(torch.eye(12)[[3, 3]], [4, 5], torch.ones(2))
    found = analysis.separation(x, v)
    a, b = x[:, 0, 1, 3].numpy(), x[:, 1, 1, 3].numpy()
    wins = (a[:, None] > b[None]).mean()
    assert found.auc[1] == pytest.approx(wins) and found.paired[1] == pytest.approx((a > b).mean())
    pooled = ((a.var(ddof=1) + b.var(ddof=1)) / 2) ** 0.5
    assert found.d_prime[1] == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-5)
    moved = analysis.separation(x + 7 * torch.eye(12)[3], v)  # a step on both sides alike
    np.testing.assert_allclose(moved[["auc", "d_prime", "paired"]], found[["auc", "d_prime", "paired"]], rtol=1e-5)
    np.testing.assert_allclose(moved.chosen, found.chosen + 7, rtol=1e-5)


def test_the_planted_axis_is_probed(unchecked: None) -> None:
    model = planted_model("bridge")
    tokenized = gr.tokens.tokenize_pairs(model, planted_pairs()[:20])
    attributions = gr.attribution.attribute_all(model, tokenized, method="leave_one_out", content_only=True)
    selections = [gr.attribution.select_tokens(a, 1) for a in attributions]
    x = analysis.residuals(model, tokenized, selections=selections)
    found = analysis.fit_probes(x[:, :, 1:], [1, 2], n_shuffles=3, vectors=axis(COPY, [1, 2]))
    assert found.frame.accuracy.min() > 0.95 and found.frame.cosine_pattern.min() > 0.9
    assert x[:, :, 0, COPY].abs().max() == 0  # before the head nothing is on that axis
    assert analysis.separation(x[:, :, 1:], axis(COPY, [1, 2])).auc.min() > 0.95


def test_bad_probe_input(bridge: Any, pairs: list[gr.PreferencePair], unchecked: None) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    with pytest.raises(ValueError, match="selections: None for 4 records"):
        analysis.residuals(bridge, tokenized)
    with pytest.raises(ValueError, match="readout='middle'"):
        analysis.residuals(bridge, tokenized, readout="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 records in n_folds=5"):
        analysis.fit_probes(features(n=3), [4, 5])
    with pytest.raises(ValueError, match="do not fit"):
        analysis.fit_probes(features(), [4])
    with pytest.raises(ValueError, match="name the layers"):
        analysis.separation(features(), random_vectors())


# -- ablation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def planted(request: pytest.FixtureRequest) -> Any:
    return planted_model(request.param)


def run_hook(hooks: Any, act: torch.Tensor) -> torch.Tensor:
    ((_, fn),) = hooks
    return fn(act, hook=None)


def test_one_direction_is_the_ablate_operator(model: Any) -> None:
    v = random_vectors()
    ids = torch.tensor([[5, 8, 12, 18]])
    ours = model.run_with_hooks(ids, fwd_hooks=analysis.ablate_hooks(v, [0, 2]))
    theirs = model.run_with_hooks(ids, fwd_hooks=v.hooks(1.0, [0, 2], operator="ablate"))
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    assert not torch.allclose(ours, model(ids), atol=1e-2)


def test_projection_theorems() -> None:
    """Idempotent, of the span's rank, orthogonal to every vector, the complement untouched, a dependent vector no change."""
    vs = [random_vectors((1,), seed=s) for s in range(3)]
    act = 5 * torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(9))
    kept = act.clone()
    hooks = analysis.ablate_hooks(vs)
    out = run_hook(hooks, act)
    assert torch.equal(act, kept)
    torch.testing.assert_close(run_hook(hooks, out), out, atol=1e-5, rtol=0)
    for v in vs:
        assert (out @ v.directions[0]).abs().max() < 1e-5
    removed = (act - out).reshape(-1, 32)
    assert torch.linalg.matrix_rank(removed, atol=1e-3) == 3
    again = run_hook(analysis.ablate_hooks([*vs, 2.0 * vs[0] + vs[1]]), act)
    torch.testing.assert_close(again, out, atol=1e-5, rtol=0)
    assert span([vs[0].directions[0], -vs[0].directions[0]]).shape == (1, 32)


def test_a_centre_is_kept() -> None:
    v = random_vectors((1,))
    act = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(9)) + 2
    mean = act.reshape(-1, 32).mean(0)
    out = run_hook(analysis.ablate_hooks(v, center={1: mean}), act)
    torch.testing.assert_close(out.reshape(-1, 32).mean(0), mean, atol=1e-5, rtol=0)
    assert (out @ v.directions[0]).std() < 1e-5


def test_from_layer_takes_one_direction_out_everywhere(model: Any) -> None:
    v = random_vectors()
    seen: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        return (f"blocks.{layer}.hook_resid_post", lambda act, hook: seen.__setitem__(layer, act @ v.directions[1]))

    hooks = analysis.ablate_hooks(v, [0, 1, 2], from_layer=1)
    model.run_with_hooks(torch.tensor([[5, 8, 12]]), fwd_hooks=[*hooks, *(keep(layer) for layer in range(3))])
    assert all(seen[layer].abs().max() < 1e-4 for layer in range(3))


def content_means(hf: Any, tokenized: Any, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Mean residual of content tokens, from the plain Hugging Face model one prompt at a time."""
    kept = [residuals(hf, t.prompt)[:, torch.tensor(t.content)] for t in tokenized]
    return {layer: torch.cat([one[layer] for one in kept]).mean(0) for layer in layers}


@pytest.mark.parametrize("center", ["mean", "zero", "given"])
def test_table_against_single_runs(model: Any, hf: Any, pairs: list[gr.PreferencePair], center: str) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    v, other = random_vectors(), random_vectors(seed=5)
    centers = {
        "mean": content_means(hf, tokenized, (0, 1, 2)),
        "zero": None,
        "given": dict(enumerate(torch.ones(3, 32))),
    }
    options: dict[str, Any] = {} if center == "mean" else {"center": centers[center] or "zero"}
    table = analysis.ablation_table(model, tokenized, [v, other], layers=[[1], [0, 2]], n_random=2, **options)
    assert table.layers.tolist() == ["1"] * 3 + ["0, 2"] * 3 and (table["rank"] == 2).all()
    assert table.vector.tolist() == ["own", "random", "random"] * 2 and table.draw.tolist() == [-1, 0, 1] * 2
    base = gr.score_pairs(model, tokenized)
    for row, layers in ((0, [1]), (3, [0, 2])):
        hooks = analysis.ablate_hooks([v, other], layers, center=centers[center])
        scores = gr.score_pairs(model, tokenized, hooks)
        change = (scores - base)[:, 0] - (scores - base)[:, 1]
        assert table.change[row] == pytest.approx(change.mean().item(), abs=ATOL)
        assert table.change_se[row] == pytest.approx(change.std().item() / 2, abs=ATOL)
        assert table.margin[row] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), abs=ATOL)
        assert table.kl[row] == pytest.approx(
            gr.evaluate.next_token_kl(model, tokenized, hooks).mean().item(), abs=ATOL
        )
    assert table.change.nunique() == 6


def test_table_of_default_layers_and_of_one_direction_everywhere(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized, v = gr.tokens.tokenize_pairs(bridge, pairs), random_vectors()
    whole = analysis.ablation_table(bridge, tokenized, v, n_random=0)
    assert whole.layers.tolist() == ["0", "1", "2", "0, 1, 2"]
    assert whole.z.isna().all() and whole.p.isna().all()
    one = analysis.ablation_table(bridge, tokenized, v, layers=[[0, 2]], from_layer=1, n_random=1)
    assert one.n.tolist() == [4, 4] and one["rank"].tolist() == [1, 1]


def test_z_and_p_are_those_of_the_random_draws(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    table = analysis.ablation_table(bridge, pairs, random_vectors(), layers=[[1], [0, 2]], n_random=6)
    for _, rows in table.groupby("layers"):
        own, random = rows.change.iloc[0], rows.change.iloc[1:].to_numpy()
        assert rows.z.iloc[0] == pytest.approx((own - random.mean()) / random.std(ddof=1), rel=1e-3)
        assert rows.p.iloc[0] == pytest.approx((1 + (np.abs(random) >= abs(own)).sum()) / 7)
        assert rows.z.iloc[1:].isna().all() and rows.p.iloc[1:].isna().all()


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_centre_is_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="center='median'"):
        analysis.ablation_table(bridge, pairs, random_vectors(), center="median")  # type: ignore[arg-type]


def test_the_planted_axis_is_what_the_preference_needs(planted: Any) -> None:
    pairs = [
        gr.PreferencePair(prompt=f"the film was {w} and it was", chosen=" great", rejected=" awful")
        for w in ("good", "warm")
    ]
    tokenized = gr.tokens.tokenize_pairs(planted, pairs)
    table = analysis.ablation_table(planted, tokenized, axis(COPY, [1, 2]), n_random=5, center="zero")
    own, random = table[table.vector == "own"], table[table.vector == "random"]
    assert own.margin.abs().max() < ATOL  # nothing else can tell the two words apart
    assert (-own.change).min() > 3 * random.change.abs().max()
    assert own.kl.min() > random.kl.max()


def test_bad_ablations_are_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    v = random_vectors((0, 1))
    with pytest.raises(ValueError, match="no vectors given"):
        analysis.ablate_hooks([])
    with pytest.raises(ValueError, match=r"center lacks layers \[1\]"):
        analysis.ablate_hooks(v, center={0: torch.zeros(32)})
    with pytest.raises(ValueError, match="2"):
        analysis.ablate_hooks(v, [2])
    with pytest.raises(ValueError, match="layers 0 to 2"):
        analysis.ablation_table(bridge, gr.tokens.tokenize_pairs(bridge, pairs), v, layers=[[9]])
    with pytest.raises(ValueError, match="no common span"):
        span([torch.ones(2), torch.ones(3)])
