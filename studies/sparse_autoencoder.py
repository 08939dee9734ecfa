"""A small top-k autoencoder of a model's activations, trained in minutes on text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import grains_tl as gr
from grains_tl.analysis.autoencoders import SparseAutoencoder
from grains_tl.hooks.sites import flat, site_point
from grains_tl.models.running import device_of, hooked, run_blocks


def written_text(model: Any, n_texts: int, n_tokens: int, *, seed: int = 0, batch: int = 64) -> list[Tensor]:
    """Token ids that the model writes at temperature 1, from single tokens drawn from the bundled records' prompts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        str(p.prompt) for p in gr.load_bundled("sentiment", "build") + gr.load_bundled("misconceptions", "build")
    ]
    pool = torch.tensor([token for text in prompts for token in model.tokenizer(text).input_ids])
    rows: list[Tensor] = []
    while len(rows) < n_texts:
        n = min(batch, n_texts - len(rows))
        start = pool[torch.randint(len(pool), (n, 2), generator=generator)].to(device_of(model))
        with torch.no_grad(), torch.random.fork_rng(devices=[start.device] if start.is_cuda else []):
            torch.manual_seed(seed + len(rows))
            out = model.original_model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=n_tokens - 2,
                min_new_tokens=n_tokens - 2,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        rows += list(out.cpu())
    return rows


def activations(model: Any, rows: Sequence[Tensor], layer: int, site: Any = "resid_post", *, skip: int = 1) -> Tensor:
    """``[token, width]`` of a site, float32 on the CPU; the first ``skip`` positions have huge norms and are left out."""
    kept: list[Tensor] = []

    def keep(act: Tensor, hook: Any) -> None:
        kept.append(flat(act.detach())[:, skip:].float().flatten(0, 1).cpu())

    with torch.no_grad(), hooked(model, [(site_point(site, layer), keep)]):
        for start in range(0, len(rows), 32):
            ids = torch.stack(list(rows[start : start + 32])).to(device_of(model))
            run_blocks(model, ids, torch.ones_like(ids), layer + 1)
    return torch.cat(kept)


def train(
    acts: Tensor,
    hook_name: str,
    *,
    n_features: int,
    k: int,
    n_steps: int,
    device: str,
    batch: int = 1024,
    seed: int = 0,
) -> tuple[SparseAutoencoder, list[float]]:
    """An autoencoder whose ``k`` largest features reconstruct activations, and its loss (share of variance not explained).

    Decoder rows have unit length. Features that have been silent for 200 steps are pulled towards the error of the tokens
    that are reconstructed worst, so that few stay dead.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, width = acts.mean(0), acts.shape[1]
    scale = (acts - mean).norm(dim=-1).mean() / width**0.5
    decoder = torch.nn.functional.normalize(torch.randn(n_features, width, generator=generator), dim=-1).to(device)
    encoder, bias = decoder.T.clone(), torch.zeros(n_features, device=device)
    centre = torch.zeros(width, device=device)
    weights = [w.requires_grad_() for w in (encoder, decoder, bias, centre)]
    optimizer = torch.optim.Adam(weights, lr=1e-3, betas=(0.9, 0.99))
    silent, losses = torch.zeros(n_features, device=device), []
    for step in range(n_steps):
        x = ((acts[torch.randint(len(acts), (batch,), generator=generator)] - mean) / scale).to(device)
        top = ((x - centre) @ encoder + bias).topk(k, dim=-1)
        features = torch.zeros(batch, n_features, device=device).scatter(1, top.indices, top.values.relu())
        error = x - features @ decoder - centre
        loss = error.square().sum() / (x - x.mean(0)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * (1 - step / n_steps))
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=-1, keepdim=True)
            silent = torch.where((features > 0).any(0), torch.zeros_like(silent), silent + 1)
            dead = (silent > 200).nonzero().flatten()[: batch // 8]
            if step % 100 == 0 and step < 0.8 * n_steps and len(dead):
                worst = error.detach().norm(dim=-1).topk(len(dead)).indices
                decoder[dead] = torch.nn.functional.normalize(error.detach()[worst], dim=-1)
                encoder[:, dead], bias[dead], silent[dead] = 0.3 * decoder[dead].T, 0.0, 0.0
        losses.append(float(loss.detach()))
    e, d, b, c = (w.detach().cpu() for w in weights)
    # back to the activations' own units: x = (act - mean) / scale
    made = SparseAutoencoder(e, d, b * scale, mean + scale * c, hook_name, k=k)
    return made, losses


def shuffled(sae: SparseAutoencoder, seed: int = 0) -> SparseAutoencoder:
    """The control: features in random directions, as many and as sparse."""
    d = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    d = torch.nn.functional.normalize(d, dim=-1)
    return replace(sae, W_dec=d, W_enc=d.T.contiguous(), b_enc=torch.zeros_like(sae.b_enc))
