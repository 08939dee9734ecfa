"""Looking at vectors: angles, stability, lenses, writers, features; against numpy, plain weights, TransformerLens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import typing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl import analysis
from grains_tl.analysis.sparse import layer_of
from tests.conftest import KINDS, tiny_hf, tiny_model
from tests.helpers.planted import COPY, HEAD, LAYER, axis, planted_model, planted_pairs

ROOMS = [m.name for m in pkgutil.iter_modules(analysis.__path__)]
LOGIT_ATOL = 1e-4  # float32 round-off of logits of size 10


def differences(n: int = 12, d_model: int = 32, shift: float = 0.0, seed: int = 0) -> gr.vectors.Differences:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(n, 2, d_model, generator=generator) for _ in range(2))
    up[..., 0] += shift
    return gr.vectors.Differences(up, down, (1, 2), torch.tensor([50.0, 80.0]))


def random_vectors(layers: tuple[int, ...] = (0, 1, 2), d_model: int = 32, seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(len(layers), d_model, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, layers, torch.full((len(layers),), 6.0))


@pytest.mark.parametrize("name", ROOMS)
def test_docstrings_and_annotations(name: str) -> None:
    module = importlib.import_module(f"grains_tl.analysis.{name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
    for thing in vars(module).values():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__:
            typing.get_type_hints(inspect.unwrap(thing))


def test_every_public_name_has_help() -> None:
    for name in analysis.__all__:
        assert len((getattr(analysis, name).__doc__ or "").strip()) > 30, name


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_table_against_numpy() -> None:
    d = differences(shift=1.5)
    vectors = gr.vectors.reduce_vectors(d)
    table = analysis.vector_table(vectors, d)
    each = (d.toward_chosen - d.toward_rejected).double().numpy()
    for row in range(2):
        unit = each[:, row].mean(0) / np.linalg.norm(each[:, row].mean(0))
        along = each[:, row] @ unit
        assert table.norm[row] == pytest.approx(np.linalg.norm(each[:, row].mean(0)), rel=1e-5)
        assert table.share[row] == pytest.approx((along**2).sum() / (each[:, row] ** 2).sum(), rel=1e-5)
        variance = along.var(ddof=1) / np.trace(np.cov(each[:, row].T))
        assert table.variance_share[row] == pytest.approx(variance, rel=1e-5)
        assert table.same_sign[row] == (along > 0).mean()
    assert table.cosine_next[0] == pytest.approx(float(vectors.directions[0] @ vectors.directions[1]), abs=1e-6)
    assert np.isnan(table.cosine_next[1])
    with pytest.raises(ValueError, match=r"lack layers \[0\]"):
        analysis.vector_table(random_vectors(), d)


def test_cosine_map() -> None:
    a, b = random_vectors(seed=0), random_vectors(seed=1)
    own = analysis.cosine_map(a)
    np.testing.assert_allclose(own.to_numpy(), (a.directions @ a.directions.T).numpy(), atol=1e-6)
    at = analysis.cosine_map({"a": a, "b": b, "minus a": -1.0 * a}, layer=1)
    assert at.index.tolist() == ["a", "b", "minus a"] and at.loc["a", "minus a"] == pytest.approx(-1)
    assert at.loc["a", "b"] == pytest.approx(float(a.directions[1] @ b.directions[1]), abs=1e-6)
    assert analysis.cosine_map({"a": a, "b": b}).shape == (6, 6)
    with pytest.raises(ValueError, match="one d_model"):
        analysis.cosine_map({"a": a, "b": random_vectors(d_model=16)})


@pytest.mark.parametrize("reduce", ["mean", "svd", "pca"])
def test_noise_is_not_stable_and_a_shift_is(reduce: Any) -> None:
    noise = analysis.stability(differences(n=16), reduce=reduce)
    assert noise.split_half.abs().max() < 0.35 and noise.sign_margin.max() < 0
    if reduce != "pca":  # centred components lose a shift: the table shows that too
        shifted = analysis.stability(differences(n=16, shift=8.0), reduce=reduce)
        assert shifted.split_half.min() > 0.8 and shifted.sign_margin.min() > 0.7
        assert (shifted.expected_cosine > shifted.split_half).all()


def test_expected_cosine_is_what_more_records_show() -> None:
    """Split-half of 2n records says how near the vector of all 2n is to the truth, which is known here."""
    many = [differences(n=40, shift=1.5, seed=seed) for seed in range(30)]
    expected = [analysis.stability(d, n_draws=20).expected_cosine.mean() for d in many]
    found = [float(gr.vectors.reduce_vectors(d).directions[:, 0].mean()) for d in many]
    assert np.mean(expected) == pytest.approx(np.mean(found), abs=0.04)


def test_stability_draws_are_its_own() -> None:
    state = torch.random.get_rng_state()
    a, b = (analysis.stability(differences(), seed=1) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    pd.testing.assert_frame_equal(a, b)
    with pytest.raises(ValueError, match="at least 4"):
        analysis.stability(differences(n=3))


@pytest.fixture(scope="module", params=KINDS)
def planted(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The planted circuit, taken apart: attributions, selections, differences, vectors."""
    model = planted_model(request.param)
    tokenized = gr.tokens.tokenize_pairs(model, planted_pairs()[:16])
    attributions = gr.attribution.attribute_all(model, tokenized, method="leave_one_out", content_only=True)
    selections = [gr.attribution.select_tokens(a, 1) for a in attributions]
    found = gr.vectors.collect_differences(model, tokenized, selections, layers=[1, 2])
    return SimpleNamespace(
        model=model,
        tokenized=tokenized,
        selections=selections,
        differences=found,
        vectors=gr.vectors.reduce_vectors(found),
    )


def test_who_built_the_vector(planted: SimpleNamespace) -> None:
    common: dict[str, Any] = {"layer": 1, "tokenized": planted.tokenized, "selections": planted.selections}
    records = analysis.building_records(planted.vectors, planted.differences, **common)
    assert records.projection.mean() == pytest.approx(float(planted.vectors.magnitudes[0]), rel=1e-5)
    np.testing.assert_allclose(records.projection, records.from_chosen + records.from_rejected)
    assert records.cosine.between(-1.001, 1.001).all()
    tokens = analysis.building_tokens(planted.vectors, planted.differences, **common)
    assert tokens.total.sum() == pytest.approx(records.projection.sum())
    assert tokens["count"].sum() == sum(len(s.toward_chosen) + len(s.toward_rejected) for s in planted.selections)
    moods = {"toward_chosen": {"good", "warm", "liked"}, "toward_rejected": {"bad", "cold", "hated"}}
    for row in tokens.nlargest(6, "total").itertuples():
        assert row.token in moods[str(row.side)]
    assert records.toward_chosen[0] in moods["toward_chosen"]
    with pytest.raises(ValueError, match="15 selections for 16"):
        analysis.building_records(
            planted.vectors,
            planted.differences,
            layer=1,
            tokenized=planted.tokenized,
            selections=planted.selections[1:],
        )
    with pytest.raises(ValueError, match="no layer"):
        analysis.building_records(axis(COPY, [0]), planted.differences, layer=0)


# -- lenses -----------------------------------------------------------------------------------------------------------


def test_lens_against_the_weights(model: Any, hf: Any) -> None:
    vectors = random_vectors()
    d = vectors.directions
    gamma, unembed = hf.model.norm.weight, hf.lm_head.weight
    wanted = (gamma * d * 32**0.5 / (1 + 1e-6) ** 0.5) @ unembed.T
    wanted = wanted - wanted.mean(-1, keepdim=True)
    found = analysis.lens_logits(model, vectors)
    torch.testing.assert_close(found, wanted, atol=LOGIT_ATOL, rtol=0)
    torch.testing.assert_close(analysis.lens_logits(model, -1.0 * vectors), -wanted, atol=LOGIT_ATOL, rtol=0)
    table = analysis.logit_lens(model, vectors, layers=[1], n_top=3)
    up = table[table.side == "up"]
    assert up.token_id.tolist() == wanted[1].topk(3).indices.tolist() and up["rank"].tolist() == [1, 2, 3]
    down = table[table.side == "down"]
    assert down.token_id.tolist() == (-wanted[1]).topk(3).indices.tolist() and (down.logit < 0).all()
    assert up.z.iloc[0] == pytest.approx(float(wanted[1].max() / wanted[1].std()), rel=1e-4)


def test_lens_of_a_model_with_biases_is_odd_and_is_the_first_order_effect() -> None:
    model, hf = tiny_model("bridge", "gpt2"), tiny_hf("gpt2")
    with torch.no_grad():
        for m in (hf.transformer.ln_f, model.original_model.transformer.ln_f):
            m.bias[:] = torch.linspace(-1, 1, 32)
    vectors = random_vectors()
    found = analysis.lens_logits(model, vectors)
    torch.testing.assert_close(found, -analysis.lens_logits(model, -1.0 * vectors), atol=LOGIT_ATOL, rtol=0)
    # a centred residual orthogonal to the step: its norm does not change to first order
    d = vectors.directions[0] - vectors.directions[0].mean()
    h = torch.randn(32, generator=torch.Generator().manual_seed(5))
    h = h - h.mean()
    h = h - (h @ d) / (d @ d) * d
    alpha = 1e-2
    with torch.no_grad():
        step = hf.lm_head(hf.transformer.ln_f(h + alpha * h.norm() * d / d.norm())) - hf.lm_head(hf.transformer.ln_f(h))
    step = (step - step.mean()) / alpha
    torch.testing.assert_close(found[0], step, atol=0.02 * float(step.abs().max()), rtol=0)


@pytest.mark.parametrize("space", ["embed", "unembed"])
def test_neighbours_against_the_weights(model: Any, hf: Any, space: Any) -> None:
    weights = hf.model.embed_tokens.weight if space == "embed" else hf.lm_head.weight
    centred = weights - weights.mean(0)
    target = 12
    v = gr.SteeringVectors.from_raw(-centred[target][None], [1], torch.ones(1))
    table = analysis.embedding_neighbours(model, v, space=space, n_top=4)
    down = table[table.side == "down"].iloc[0]
    assert down.token_id == target and down.cosine == pytest.approx(-1, abs=1e-5)
    wanted = torch.nn.functional.cosine_similarity(v.directions, centred).topk(4)
    up = table[table.side == "up"]
    assert up.token_id.tolist() == wanted.indices.tolist()
    np.testing.assert_allclose(up.cosine, wanted.values, atol=1e-5)


def test_bad_lens_options(model: Any) -> None:
    with pytest.raises(ValueError, match="n_top=0"):
        analysis.logit_lens(model, random_vectors(), n_top=0)
    with pytest.raises(ValueError, match="do not fit"):
        analysis.lens_logits(model, random_vectors(d_model=16))


# -- writers ----------------------------------------------------------------------------------------------------------


def test_the_parts_add_up_and_are_those_of_the_cache(model: Any, pairs: list[gr.PreferencePair]) -> None:
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    vectors = random_vectors()
    table = analysis.writers(model, tokenized, vectors, layer=1)
    wanted: dict[tuple[str, int, int], list[float]] = {}
    whole = []
    for t in tokenized:  # one record at a time, through TransformerLens' own cache
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([t.prompt]))
        u = vectors.directions[1]
        heads = cache.stack_head_results(layer=2, pos_slice=-1)[:, 0] @ u
        mlps = cache.stack_activation("mlp_out")[:2, 0, -1] @ u
        for i, value in enumerate(heads.tolist()):
            wanted.setdefault(("head", i // 4, i % 4), []).append(value)
        for i, value in enumerate(mlps.tolist()):
            wanted.setdefault(("mlp", i, -1), []).append(value)
        wanted.setdefault(("embed", -1, -1), []).append(float(cache["blocks.0.hook_resid_pre"][0, -1] @ u))
        whole.append(float(cache["blocks.1.hook_resid_post"][0, -1] @ u))
    for row in table[table.kind != "rest"].itertuples():
        part: Any = (row.kind, row.layer, row.head)
        values = wanted.pop(part)
        assert row.projection == pytest.approx(np.mean(values), abs=1e-4)
        assert row.se == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-4)
    assert not wanted
    assert table.projection.sum() == pytest.approx(np.mean(whole), abs=1e-4)
    assert abs(table[table.kind == "rest"].projection.item()) < 1e-4  # no biases in a Llama
    assert table.share.sum() == pytest.approx(1)


def test_writers_of_a_model_with_biases_leave_them_to_the_rest(pairs: list[gr.PreferencePair]) -> None:
    model = tiny_model("bridge", "gpt2")
    with torch.no_grad():
        model.original_model.transformer.h[0].attn.c_proj.bias[:] = 0.3
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    u = random_vectors().at([2])
    table = analysis.writers(model, tokenized, u, layer=2)
    assert table[table.kind == "rest"].projection.item() == pytest.approx(0.3 * float(u.directions[0].sum()), abs=1e-4)


def test_the_planted_head_writes_the_vector(planted: SimpleNamespace) -> None:
    table = analysis.writers(planted.model, planted.tokenized, planted.vectors, layer=1, selections=planted.selections)
    first = table.nlargest(1, "projection").iloc[0]
    assert (first.kind, first.layer, first["head"]) == ("head", LAYER, HEAD) and first.share > 0.7
    assert table.projection.sum() == pytest.approx(float(planted.vectors.magnitudes[0]), rel=1e-4)
    with pytest.raises(ValueError, match="1 selections for 16"):
        analysis.writers(planted.model, planted.tokenized, planted.vectors, layer=1, selections=planted.selections[:1])


# -- sparse features --------------------------------------------------------------------------------------------------


def decoder(d_sae: int = 200, d_model: int = 64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(d_sae, d_model, generator=torch.Generator().manual_seed(seed))


def mixture(features: list[int], weights: list[float]) -> gr.SteeringVectors:
    rows = torch.nn.functional.normalize(decoder()[features], dim=-1)
    return gr.SteeringVectors.from_raw((torch.tensor(weights) @ rows)[None], [4], torch.full((1,), 50.0))


def test_a_planted_mixture_is_found() -> None:
    vectors = mixture([7, 30, 150], [1.0, -0.8, 0.6])
    table = analysis.sparse_decomposition(vectors, decoder(), layer=4, n_features=20)
    assert set(table.feature) == {7, 30, 150} and table.explained.iloc[-1] == pytest.approx(1)
    signs = dict(zip(table.feature, np.sign(table.coefficient), strict=True))
    assert signs == {7: 1, 30: -1, 150: 1}
    again = analysis.feature_vectors(vectors, decoder(), table, layer=4)
    assert again.cosine(vectors).item() == pytest.approx(1, abs=1e-6)
    assert again.hooks(0.2)[0][0] == "blocks.4.hook_resid_post"
    cosines = analysis.decoder_cosines(vectors, decoder(), layer=4, n_top=3)
    wanted = torch.nn.functional.cosine_similarity(decoder(), vectors.directions)
    assert cosines.feature.tolist() == wanted.abs().topk(3).indices.tolist()
    np.testing.assert_allclose(cosines.cosine, wanted[cosines.feature.tolist()], atol=1e-6)


def test_nonnegative_regression_cannot_point_against_a_feature() -> None:
    vectors = mixture([7, 30], [1.0, -0.8])
    signed = analysis.sparse_decomposition(vectors, decoder(), layer=4, n_features=5)
    positive = analysis.sparse_decomposition(vectors, decoder(), layer=4, n_features=5, nonnegative=True)
    assert (positive.coefficient >= 0).all() and 30 not in positive.feature.tolist()
    assert positive.explained.iloc[-1] < signed.explained.iloc[-1]
    assert (positive.explained.diff().dropna() >= -1e-9).all()


def test_greedy_fit_is_scikit_learns() -> None:
    from sklearn.linear_model import OrthogonalMatchingPursuit

    vectors = random_vectors((4,), d_model=64, seed=9)
    rows = torch.nn.functional.normalize(decoder(), dim=-1).double().numpy()
    oracle = OrthogonalMatchingPursuit(n_nonzero_coefs=6, fit_intercept=False)
    oracle.fit(rows.T, vectors.directions[0].double().numpy())
    table = analysis.sparse_decomposition(vectors, decoder(), layer=4, n_features=6)
    np.testing.assert_allclose(oracle.coef_[table.feature], table.coefficient, atol=1e-6)
    assert np.count_nonzero(oracle.coef_) == len(table) == 6


def test_bad_sparse_input() -> None:
    v = mixture([1], [1.0])
    with pytest.raises(ValueError, match=r"\[d_sae, 64\]"):
        analysis.decoder_cosines(v, torch.ones(3, 5), layer=4)
    with pytest.raises(ValueError, match="features \\[200\\]"):
        analysis.feature_vectors(v, decoder(), [200], layer=4)
    with pytest.raises(ValueError, match="n_features=0"):
        analysis.sparse_decomposition(v, decoder(), layer=4, n_features=0)
    for name in ("blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out"):
        with pytest.raises(ValueError, match="residual stream"):
            layer_of(name)


def test_without_saelens_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"grains-tl\[sae\]"):
        analysis.load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


def test_an_sae_of_saelens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens' own class and files: saved, loaded through ``load_sae``, and one of its features found and steered with."""
    sae_lens = pytest.importorskip("sae_lens")
    cfg = sae_lens.StandardSAEConfig(d_in=32, d_sae=96, device="cpu")
    cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    sae = sae_lens.StandardSAE(cfg)
    sae.save_model(str(tmp_path))
    load = lambda release, sae_id, device: sae_lens.SAE.load_from_disk(str(tmp_path), device=device)  # noqa: E731
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", staticmethod(load))
    loaded, layer = analysis.load_sae("any", "any")
    assert layer == 1 and torch.equal(loaded.W_dec, sae.W_dec)
    model = tiny_model("bridge")
    vectors = gr.SteeringVectors.from_raw(loaded.W_dec[[5]].detach(), [layer], torch.full((1,), 6.0))
    assert analysis.decoder_cosines(vectors, loaded.W_dec, layer=layer, n_top=1).feature.item() == 5
    feature = analysis.feature_vectors(vectors, loaded.W_dec, [5], layer=layer)
    ids = torch.tensor([[5, 8, 12]])
    assert torch.allclose(
        model.run_with_hooks(ids, fwd_hooks=feature.hooks(0.3)), model.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.3))
    )
