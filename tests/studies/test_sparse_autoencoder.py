"""The study's autoencoder finds planted features, and its files are read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import grains_tl as gr
from studies.sparse_autoencoder import activations, shuffled, train


def test_planted_features_are_found(tmp_path: Path) -> None:
    """Sparse sums of 24 directions in 16 dimensions, more than fit at right angles, with a mean and a scale of their own."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=-1)
    active = torch.rand(4000, 24, generator=generator) * (torch.rand(4000, 24, generator=generator) < 0.08)
    acts = 20 * active @ planted + 3.0
    point = "blocks.1.hook_resid_post"
    sae, losses = train(acts, point, n_features=32, k=4, n_steps=900, device="cpu", batch=256)
    again = gr.analysis.read_sae(sae.save(tmp_path / "sae"))
    left = (acts - again.reconstruct(acts)).square().sum() / (acts - acts.mean(0)).square().sum()
    assert left < 0.1 < losses[0]
    cosines = (planted @ torch.nn.functional.normalize(again.W_dec, dim=-1).T).amax(-1)
    assert (cosines > 0.9).float().mean() > 0.7
    drawn = shuffled(again)
    control = (acts - drawn.reconstruct(acts)).square().sum() / (acts - acts.mean(0)).square().sum()
    assert control > 3 * left


def test_activations_are_the_models(bridge: Any) -> None:
    rows = [torch.tensor([3, 5, 8, 12]), torch.tensor([4, 6, 9, 11])]
    found = activations(bridge, rows, 1)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.stack(rows))
    torch.testing.assert_close(found, cache["blocks.1.hook_resid_post"][:, 1:].flatten(0, 1))
