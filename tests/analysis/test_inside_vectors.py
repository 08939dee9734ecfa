"""Sparse vectors, autoencoders from files, and lenses against what steering does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.analysis.autoencoders import SparseAutoencoder
from grains_tl.hooks.sites import site_point
from grains_tl.inference.logprobs import score_pairs
from grains_tl.inference.objectives import margins
from grains_tl.models import building
from grains_tl.models.running import hooked
from grains_tl.tokens.pairs import tokenize_pairs
from tests.conftest import TL_MAJOR, tiny_hf, tiny_tokenizer

TEXTS = ["the film was good and the food was warm", "we liked the hotel but the soup was cold"]
IDS = torch.tensor([[3, 5, 8, 12, 6, 9, 11]])


def random_vectors(n: int = 1, d: int = 32, seed: int = 0) -> gr.SteeringVectors:
    raw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(1, n + 1), torch.full((n,), 4.0))


# -- coordinates ------------------------------------------------------------------------------------------------------


def test_the_largest_coordinates_are_the_nearest_vector() -> None:
    """Of all subsets of that many coordinates none is nearer to the vector; by the gradient none raises it more."""
    v, g = random_vectors(d=7), random_vectors(d=7, seed=1)
    for n in (1, 3, 6):
        kept = gr.analysis.keep_coordinates(v, n / 7)
        raised = gr.analysis.keep_coordinates(v, n / 7, gradient=g)
        parts = [v.raw[0][list(c)].norm() / v.raw[0].norm() for c in itertools.combinations(range(7), n)]
        gains = [(v.raw[0] * g.raw[0])[list(c)].sum() for c in itertools.combinations(range(7), n)]
        assert float(kept.cosine(v)) == pytest.approx(float(max(parts)), rel=1e-5)
        assert float((raised.raw * g.raw).sum()) == pytest.approx(float(max(gains)), rel=1e-5)
        assert int((kept.directions != 0).sum()) == int((raised.directions != 0).sum()) == n
    torch.testing.assert_close(gr.analysis.keep_coordinates(v, 1.0).raw, v.raw)
    draws = [gr.analysis.keep_coordinates(v, 3 / 7, random=seed) for seed in range(2)]
    assert not torch.equal(draws[0].directions, draws[1].directions)


def test_sparsity_curve_measures_the_kept_coordinates(model: Any, pairs: list[gr.PreferencePair]) -> None:
    v, g = random_vectors(), random_vectors(seed=1)
    step = v.steering(0.3, 1, operator="add")
    curve = gr.analysis.sparsity_curve(
        model, step, pairs, gradient=g, shares=[0.1, 1.0], kl=0.02, n_random=1, texts=TEXTS
    )
    assert curve["by"].tolist() == ["gradient"] * 2 + ["random"] * 2 + ["size"] * 2
    assert curve["kl"].tolist() == pytest.approx([0.02] * 6, rel=0.1)
    tokenized = tokenize_pairs(model, pairs)
    base = margins(score_pairs(model, tokenized))
    largest = v.raw[0].abs().topk(4).indices
    masked = torch.zeros(32).index_put((largest,), 0.3 * 4.0 * v.directions[0][largest])
    plain = [("blocks.1.hook_resid_post", lambda act, hook: act + masked)]
    wanted = {0.1: margins(score_pairs(model, tokenized, plain)), 1.0: margins(score_pairs(model, tokenized, step))}
    for row in curve[curve["by"] == "size"].itertuples():
        assert row.effect_as_is == pytest.approx(float((wanted[row.share] - base).mean()), abs=2e-4)
    whole = curve[curve.share == 1.0]
    assert whole["cosine"].tolist() == pytest.approx([1.0] * 3)
    assert whole["effect"].tolist() == pytest.approx([float(whole["effect"].iloc[0])] * 3, rel=1e-3)
    assert isinstance(gr.plotting.plot_sparsity(curve), matplotlib.figure.Figure)


def test_refused_coordinates(model: Any, pairs: Any, unchecked: None) -> None:
    v = random_vectors()
    for bad in ({"share": 0.0}, {"share": 1.5}, {"share": 0.5, "gradient": v, "random": 0}):
        with pytest.raises(ValueError):
            gr.analysis.keep_coordinates(v, **bad)
    with pytest.raises(ValueError, match="layers"):
        gr.analysis.keep_coordinates(v, 0.5, gradient=random_vectors(2))
    calls: list[dict[str, Any]] = [{"shares": []}, {"kl": 0.0}, {"shares": [2.0]}]
    for options in calls:
        with pytest.raises(ValueError):
            gr.analysis.sparsity_curve(model, v.steering(0.1), pairs, **options)
    with pytest.raises(ValueError, match="expected vectors.steering"):
        gr.analysis.sparsity_curve(model, v.hooks(0.1), pairs)  # type: ignore[arg-type]


# -- autoencoders -----------------------------------------------------------------------------------------------------


def planted_sae(site: Any = "resid_post", **options: Any) -> SparseAutoencoder:
    """Sixteen orthonormal features of width 32, read as they are written."""
    basis = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(3)))[0]
    point = site_point(site, 1)
    return SparseAutoencoder(basis, basis.T.clone(), torch.zeros(16), torch.zeros(32), point, **options)


def test_planted_features_are_read_clamped_and_taken_out() -> None:
    """With orthonormal features each is read exactly, and setting one leaves all else of the activation as it was."""
    sae = planted_sae()
    generator = torch.Generator().manual_seed(0)
    planted = torch.rand(2, 5, 16, generator=generator) * (torch.rand(2, 5, 16, generator=generator) < 0.3)
    other = torch.randn(2, 5, 32, generator=generator)
    other = other - other @ sae.W_dec.T @ sae.W_dec  # what no feature writes: the reconstruction error
    act = planted @ sae.W_dec + other
    torch.testing.assert_close(sae.features(act), planted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(act - sae.reconstruct(act), other, atol=1e-5, rtol=1e-5)
    ((_, fn),) = gr.analysis.sae_hooks(sae, clamp={3: 2.5}, ablate=[7])
    wanted = planted.clone()
    wanted[..., 3], wanted[..., 7] = 2.5, 0.0
    torch.testing.assert_close(fn(act, hook=None), wanted @ sae.W_dec + other, atol=1e-5, rtol=1e-5)


def test_changing_nothing_changes_no_bit(bridge: Any) -> None:
    sae = SparseAutoencoder(*planted_sae().__dict__.values())
    with torch.no_grad():
        base = bridge(IDS)
        for hooks in (gr.analysis.sae_hooks(sae), gr.analysis.sae_hooks(sae, ablate=[])):
            with hooked(bridge, hooks):
                assert torch.equal(bridge(IDS), base)
    act = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    silent = (sae.features(act).amax((0, 1)) == 0).nonzero().flatten().tolist()
    assert silent
    assert gr.analysis.sae_hooks(sae, ablate=silent)[0][1](act, hook=None) is act


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"])
def test_features_of_every_site(model: Any, site: Any) -> None:
    sae = planted_sae(site)
    seen: dict[int, Tensor] = {}

    def keep(act: Tensor, hook: Any) -> None:
        seen[len(seen)] = act.flatten(2).clone()

    point = [(site_point(site, 1), keep)]
    with torch.no_grad(), hooked(model, point):
        model(IDS)
    with torch.no_grad(), hooked(model, [*gr.analysis.sae_hooks(sae, clamp={2: 1.5}), *point]):
        model(IDS)
    before, after = seen.values()
    moved = before + (1.5 - sae.features(before)[..., 2:3]) * sae.W_dec[2]
    torch.testing.assert_close(after, moved, atol=1e-5, rtol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": 3},
    "topk with norms": {"k": 3, "decoder_norms": True},
    "jumprelu": {"threshold": torch.full((16,), 0.4)},
    "no input bias": {"input_bias": False},
    "layer norm": {"layer_norm": True},
}


def random_sae(**options: Any) -> SparseAutoencoder:
    g = torch.Generator().manual_seed(5)
    shapes = [(32, 16), (16, 32), (16,), (32,)]
    weights = [torch.randn(shape, generator=g) for shape in shapes]
    return SparseAutoencoder(weights[0], weights[1], weights[2], weights[3], "blocks.1.hook_resid_post", **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_files_give_the_same_features(name: str, tmp_path: Path) -> None:
    sae = random_sae(**OPTIONS[name])
    again = gr.analysis.read_sae(sae.save(tmp_path / "sae"))
    act = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.features(act), sae.features(act))
    assert torch.equal(again.reconstruct(act), sae.reconstruct(act))
    assert (again.site, again.layer, repr(again)) == (sae.site, sae.layer, repr(sae))
    features = sae.features(act)
    assert bool((features >= 0).all())
    if sae.k:
        assert int((features > 0).sum(-1).max()) <= 3
    if not sae.layer_norm:  # what all features write is the reconstruction without its bias
        torch.testing.assert_close(sae.difference(act, features) + sae.b_dec, sae.reconstruct(act))


@pytest.mark.parametrize("name", OPTIONS)
def test_features_are_those_of_saelens(name: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = random_sae(**OPTIONS[name])
    theirs = sae_lens.SAE.load_from_disk(str(sae.save(tmp_path / "sae")), device="cpu")
    act = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(act), sae.features(act), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(act), sae.reconstruct(act), atol=1e-5, rtol=1e-5)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = random_sae().save(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    bad: list[tuple[dict[str, Any], str]] = [
        ({"architecture": "gated"}, "gated"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"architecture": "topk"}, "topk"),
        ({"architecture": "jumprelu"}, "threshold"),
        ({"metadata": {}}, "hook_name"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_q"}}, "hook_q"),
    ]
    for change, said in bad:
        (folder / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=said):
            gr.analysis.read_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        gr.analysis.read_sae(folder)
    with pytest.raises(FileNotFoundError):
        gr.analysis.read_sae(tmp_path)
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": {}}))
    assert gr.analysis.read_sae(folder, hook_name="blocks.0.hook_mlp_out").site == "mlp_out"
    for options in ({"clamp": {16: 1.0}}, {"clamp": {1: -1.0}}, {"clamp": {1: 1.0}, "ablate": [1]}, {"ablate": [2, 2]}):
        with pytest.raises(ValueError, match="features"):
            gr.analysis.sae_hooks(planted_sae(), **options)  # type: ignore[arg-type]


# -- lenses -----------------------------------------------------------------------------------------------------------


def linear_model() -> Any:
    """A Llama whose blocks add nothing and whose norm hardly varies: logits are linear in the residual stream."""
    hf = tiny_hf()
    for block in hf.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    hf.model.embed_tokens.weight[:, 0] = 1e4  # decides the norm alone
    hf.lm_head.weight[:, 0] = 0
    tokenizer = tiny_tokenizer()
    building.keep_tokenizer_as_is(tokenizer, "tiny")
    return building.bridge_of(hf, tokenizer, "tiny").eval().requires_grad_(False)


def test_on_a_linear_model_all_lenses_agree_with_the_truth() -> None:
    model, lens = linear_model(), None
    if TL_MAJOR >= 4:
        from transformer_lens.tools.analysis import JacobianLens

        lens = JacobianLens({1: torch.eye(32)}, n_prompts=1, d_model=32)
    v = gr.SteeringVectors.from_raw(random_vectors().raw, [1], torch.tensor([200.0]))
    table = gr.analysis.lens_agreement(
        model, v.steering(0.5, operator="add"), lens=lens, texts=TEXTS, n_top=5, n_random=2
    )
    assert len(table) == 3 * (1 if lens is None else 2)
    assert table["rank_correlation"].min() > 0.999
    assert table[["overlap_up", "overlap_down"]].min().min() >= 0.8  # of five, one may change places by round-off
    down = gr.analysis.lens_agreement(model, v.steering(-0.5, operator="add"), texts=TEXTS, n_top=5, n_random=0)
    assert down["rank_correlation"].iloc[0] > 0.999
    if lens is not None:
        wrong = JacobianLens({1: -torch.eye(32)}, n_prompts=1, d_model=32)
        turned = gr.analysis.lens_agreement(
            model, v.steering(0.5, operator="add"), lens=wrong, texts=TEXTS, n_top=5, n_random=0
        )
        assert turned.set_index("lens").loc["Jacobian lens", "rank_correlation"] < -0.999
    assert isinstance(gr.plotting.plot_lenses(table), matplotlib.figure.Figure)


def test_promoted_tokens_are_what_plain_runs_show(model: Any, hf: Any) -> None:
    v = random_vectors()
    table = gr.analysis.promoted_tokens(model, v.steering(0.5, operator="add"), texts=TEXTS, n_top=4)
    changes = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text).input_ids])

        def add(module: Any, args: Any, output: Any) -> Any:
            return (
                output + 2.0 * v.directions[0] if isinstance(output, Tensor) else (output[0] + 2.0 * v.directions[0],)
            )

        with torch.no_grad():
            base = hf(ids).logits.log_softmax(-1)
            handle = hf.model.layers[1].register_forward_hook(add)
            moved = hf(ids).logits.log_softmax(-1)
            handle.remove()
        changes.append((moved - base)[0, :-1])
    change = torch.cat(changes).mean(0)
    change = change - change.mean()
    up = table[table.side == "up"]
    assert up.token_id.tolist() == change.topk(4).indices.tolist()
    assert up.change.tolist() == pytest.approx(change.topk(4).values.tolist(), abs=1e-4)


def test_refused_lenses(bridge: Any, unchecked: None) -> None:
    two = random_vectors(2)
    with pytest.raises(ValueError, match="one layer"):
        gr.analysis.lens_agreement(bridge, two.steering(0.1, [1, 2]))
    with pytest.raises(ValueError, match="expected vectors.steering"):
        gr.analysis.promoted_tokens(bridge, two.hooks(0.1, [1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_top"):
        gr.analysis.lens_agreement(bridge, two.steering(0.1, 1), n_top=0)
