"""Vectors of every site: built as a plain hook reads them, swept as full runs score them, saved with their site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import grains_tl as gr
from grains_tl.hooks.sites import Site, site_point
from grains_tl.inference.logprobs import score_pairs
from grains_tl.inference.objectives import margins
from grains_tl.tokens.pairs import tokenize_pairs
from grains_tl.vectors import export
from grains_tl.vectors.recipes import RECIPES

SITES: tuple[Any, ...] = get_args(Site)
OTHER: tuple[Any, ...] = tuple(site for site in SITES if site != "resid_post")


@contextmanager
def reading(hf: Any, layer: int, store: dict[str, Tensor]) -> Iterator[None]:
    """Plain hooks on a Hugging Face Llama that keep every site of one block."""
    block = hf.model.layers[layer]

    def keep(name: str, value: Any) -> None:
        store[name] = (value[0] if isinstance(value, tuple) else value).detach()[0]

    handles = [
        block.register_forward_pre_hook(lambda m, a: keep("resid_pre", a[0])),
        block.register_forward_hook(lambda m, a, out: keep("resid_post", out)),
        block.self_attn.register_forward_hook(lambda m, a, out: keep("attn_out", out)),
        block.post_attention_layernorm.register_forward_pre_hook(lambda m, a: keep("resid_mid", a[0])),
        block.mlp.register_forward_hook(lambda m, a, out: keep("mlp_out", out)),
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: keep("z", a[0])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", SITES)
def test_caa_is_what_plain_hooks_read(model: Any, hf: Any, pairs: Any, site: Any) -> None:
    pairs = pairs[:2]
    found = gr.build_vectors(model, pairs, recipe="caa", layers=[0, 2], site=site, progress=False)
    assert found.site == site
    for row, layer in enumerate((0, 2)):
        differences, norms = [], []
        for t in tokenize_pairs(model, pairs):
            ends = []
            for response in (t.chosen, t.rejected):
                store: dict[str, Tensor] = {}
                with reading(hf, layer, store), torch.no_grad():
                    hf(torch.tensor([[*t.prompt, *response]]))
                ends.append(store[site][-1])
            differences.append(ends[0] - ends[1])
            norms += [store[site][p].norm() for p in range(len(t.prompt)) if t.content[p]]
        torch.testing.assert_close(found.raw[row], torch.stack(differences).mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.resid_norms[row], torch.stack(norms).median(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_the_margin_gradient_is_a_derivative(model: Any, pairs: Any, site: Any) -> None:
    found = gr.build_vectors(model, pairs, recipe="margin_gradient", layers=[1], site=site, progress=False)
    other = torch.randn(found.raw.shape, generator=torch.Generator().manual_seed(1))
    tokenized = tokenize_pairs(model, pairs)
    for raw in (found.raw, other):
        small = gr.SteeringVectors.from_raw(raw, [1], torch.ones(1), site=site)
        up, down = (
            margins(score_pairs(model, tokenized, small.steering(a, operator="add"))).double() for a in (3e-3, -3e-3)
        )
        slope = float((up - down).mean()) / 6e-3
        assert slope == pytest.approx(float((found.raw * small.directions).sum()), rel=2e-2, abs=5e-3)


@pytest.mark.parametrize("site", OTHER)
def test_sweeps_equal_full_runs(model: Any, pairs: Any, site: Any, tmp_path: Path) -> None:
    vectors = gr.build_vectors(model, pairs, recipe="caa", layers=[0, 2], site=site, progress=False)
    pairs, texts = pairs[:2], ["it was cold and the food was bad"]
    frame = gr.sweep(model, vectors, pairs, alphas=[0.7], neutral=texts, progress=False)
    tokenized = tokenize_pairs(model, pairs)
    base = margins(score_pairs(model, tokenized))
    for row in frame.itertuples():
        step = vectors.steering(row.alpha, row.layer)
        wanted = (margins(score_pairs(model, tokenized, step)) - base).mean()
        assert row.effect == pytest.approx(float(wanted), abs=1e-4)
        kl, n = 0.0, 0
        for text in texts:
            ids = torch.tensor([model.tokenizer(text).input_ids])
            with torch.no_grad():
                plain = model(ids)[0, :-1].log_softmax(-1)
                with step.applied(model):
                    steered = model(ids)[0, :-1].log_softmax(-1)
            kl, n = kl + float((steered.exp() * (steered - plain)).sum()), n + len(plain)
        assert row.kl == pytest.approx(kl / n, abs=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_files_keep_the_site(site: Any, tmp_path: Path) -> None:
    v = gr.SteeringVectors.from_raw(torch.eye(2), (4, 5), torch.ones(2), {"method": "x"}, site=site)
    path = v.save(tmp_path / "v.safetensors")
    with safe_open(path, "pt") as handle:
        about = handle.metadata()
    # readers of version 2 know no sites: they must not take these for vectors of the residual stream
    assert about["version"] == ("2" if site == "resid_post" else "3")
    assert json.loads(about["manifest"])["hook_point"] == site_point(site, "{layer}")
    again = gr.load_vectors(path)
    assert again.site == site
    for one in (again.at([5]), again * 2, -again, again + v, again.to("cpu"), next(iter(again))):
        assert one.site == site
    assert ("site" in repr(again)) == (site != "resid_post")


def test_an_unknown_hook_point_is_refused(tmp_path: Path) -> None:
    path = gr.SteeringVectors.from_raw(torch.eye(2), (4, 5), torch.ones(2)).save(tmp_path / "v.safetensors")
    with safe_open(path, "pt") as handle:
        about = dict(handle.metadata())
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    about |= {"version": "1", "manifest": about["manifest"].replace("resid_post", "q_input")}
    save_file(tensors, path, metadata=about)
    with pytest.raises(ValueError, match="hook_q_input"):
        gr.load_vectors(path)


@pytest.mark.parametrize("site", OTHER)
def test_what_knows_no_sites_refuses(bridge: Any, hf: Any, pairs: Any, site: Any, tmp_path: Path) -> None:
    vectors = gr.build_vectors(bridge, pairs, recipe="caa", layers=[1], site=site, progress=False)
    step = vectors.steering(1.0, operator="add")
    tries: dict[str, Any] = {
        "export": lambda: export.steps(vectors, 1.0),
        "gguf": lambda: export.export_gguf(vectors, tmp_path / "v.gguf"),
        "vllm": lambda: export.vllm_interventions(vectors, alpha=1.0),
        "hf": lambda: export.export_hf(bridge, vectors, tmp_path / "hf", alpha=1.0),
        "torch": lambda: step.torch_hooks(hf),
        "mechanism": lambda: gr.analysis.mechanism(bridge, step, pairs),
        "writers": lambda: gr.analysis.writers(bridge, pairs, vectors, layer=1),
        "explore": lambda: gr.explore(bridge, vectors, "the film"),
        "ablate": lambda: gr.analysis.ablate_hooks(vectors),
    }
    for name, call in tries.items():
        with pytest.raises(ValueError, match=site) as said:
            call()
        assert "resid_post" in str(said.value), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_at_a_site_or_refuses(bridge: Any, pairs: Any, recipe: str) -> None:
    options: dict[str, Any] = {"top_k": 1} if recipe == "grains" else {}
    if recipe == "orthogonal_direction":
        options["like"] = gr.build_vectors(bridge, pairs, recipe="caa", layers=[1], site="z", progress=False)
    if recipe in ("kl_optimal", "trained"):
        with pytest.raises(ValueError, match="site='z'"):
            gr.build_vectors(bridge, pairs, recipe=recipe, layers=[1], site="z", progress=False)
        return
    found = gr.build_vectors(bridge, pairs, recipe=recipe, layers=[1], site="z", progress=False, **options)
    assert found.site == "z"
    assert found.directions.norm(dim=-1).tolist() == pytest.approx([1.0])


def test_checkpoints_keep_sites_apart(bridge: Any, pairs: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    run: dict[str, Any] = {"recipe": "margin_gradient", "layers": [1], "progress": False}
    first = {s: gr.build_vectors(bridge, pairs, site=s, checkpoint=path, **run) for s in SITES}
    for site in SITES:
        plain = gr.build_vectors(bridge, pairs, site=site, **run)
        torch.testing.assert_close(first[site].directions, plain.directions)
    raw = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    alike = {s: gr.SteeringVectors.from_raw(raw, [1], torch.ones(1), site=s) for s in SITES}
    frame = gr.sweep(bridge, alike, pairs, alphas=[1.0], checkpoint=tmp_path / "s.jsonl", progress=False)
    assert len(set(frame.effect.round(6))) == len(SITES)
    assert len({v.steering(1.0).key for v in alike.values()}) == len(SITES)
