"""What each building record contributes to each recipe, computed once: building samples are then subsets of a pool."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grains_tl as gr
from grains_tl._util.files import hash_of
from grains_tl.attribution.removal import leave_out_scores
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.models.running import device_of, resid_post
from grains_tl.models.state import autograd
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.prompts import prompt_ids
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.fisher import Fisher
from grains_tl.vectors.gradients import MarginGradient
from grains_tl.vectors.kl_optimal import COST_TEXTS
from grains_tl.vectors.readout import read_out

#: Samples for the Fisher matrix: a little more than the width of SmolLM2 and Gemma; a larger width is left to shrinkage.
N_FISHER = 648


class Parts(NamedTuple):
    """Contributions of a pool of building records.

    Attributes:
        scores: per record, leave-one-out scores of its content tokens, nats.
        masked: per record ``[token, layer, d_model]``, what masking each content token takes from the read-out.
        at_token: per record ``[token, layer, d_model]``, what masking each content token changes at the token itself.
        of_token: per record ``[token, layer, d_model]``, the margin's gradient by a step at each content token alone.
        gradients: ``[record, layer, d_model]`` of the margin.
        caa: ``[record, layer, d_model]`` response-end differences.
        norms: ``[layer]``, the unit of alpha.
        seconds: CPU seconds per record for each kind.
    """

    scores: list[Tensor]
    masked: list[Tensor]
    at_token: list[Tensor]
    of_token: list[Tensor]
    gradients: Tensor
    caa: Tensor
    norms: Tensor
    seconds: dict[str, float]

    def of(self, records: Sequence[int]) -> Parts:
        """The contributions of some records."""
        rows = list(records)

        def own(of_records: list[Tensor]) -> list[Tensor]:
            return [of_records[i] for i in rows if of_records]

        return self._replace(
            scores=own(self.scores),
            masked=own(self.masked),
            at_token=own(self.at_token),
            of_token=own(self.of_token),
            gradients=self.gradients[rows],
            caa=self.caa[rows],
        )


@contextmanager
def timed(seconds: dict[str, float], name: str, n: int) -> Iterator[None]:
    """CPU seconds per record."""
    start = time.process_time()
    yield
    seconds[name] = round((time.process_time() - start) / n, 3)


def contributions(
    model: Any,
    pairs: Sequence[gr.PreferencePair],
    layers: Sequence[int],
    file: Path,
    *,
    half: bool | None = None,
    masking: bool = True,
) -> Parts:
    """Every record's contributions, from ``file`` if it is of these records and layers.

    Args:
        model: the model.
        pairs: the pool of building records.
        layers: candidate layers.
        file: where to keep them (tens of MB).
        half: run the masked prompts in bfloat16 autocast; by default on a CPU only.
        masking: with leave-one-out scores, masked prompts and gradients by token, which take most of the time.
    """
    device = device_of(model).type
    half = device == "cpu" if half is None else half
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    key = hash_of([[t.prompt, t.chosen, t.rejected] for t in tokenized] + [list(layers), half])
    if file.exists():
        kept = torch.load(file, weights_only=True)
        if kept.pop("key") == key and (kept["masked"] or not masking):
            return Parts(**kept)
    seconds: dict[str, float] = {}
    n = len(tokenized)
    records = BuildingRecords(model, tokenized, tuple(layers))
    with timed(seconds, "caa", n):
        caa, norms = records.response_differences, records.resid_norms
    with timed(seconds, "margin_gradient", n):
        gradients = MarginGradient().per_record(records)
    scores: list[Tensor] = []
    masked: list[Tensor] = []
    at_token: list[Tensor] = []
    of_token: list[Tensor] = []
    if masking:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            with timed(seconds, "leave_one_out", n):
                places = [[[p] for p, keep in enumerate(t.content) if keep] for t in tokenized]
                found, _ = leave_out_scores(model, tokenized, places, objective="sum", mask="mean_embedding")
            with timed(seconds, "masked_prompts", n):
                masked = masked_differences(model, tokenized, layers)
            with timed(seconds, "masked_prompts_at_token", n):
                at_token = masked_differences(model, tokenized, layers, readout="attributed")
        with timed(seconds, "gradients_by_token", n):
            of_token = [token_gradients(model, t, layers) for t in tokenized]
        scores = [s[torch.tensor(t.content)] for s, t in zip(found, tokenized, strict=True)]
    parts = Parts(scores, masked, at_token, of_token, gradients, caa, norms, seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": key, **parts._asdict()}, file)
    return parts


def masked_differences(
    model: Any, records: Sequence[TokenizedPair], layers: Sequence[int], **options: Any
) -> list[Tensor]:
    """Per record ``[content token, layer, d_model]``: read-out of the whole prompt minus that without the token.

    With ``readout="attributed"`` each is read at the token that is taken out.
    """
    places = [[p for p, keep in enumerate(t.content) if keep] for t in records]
    repeated = [t for t, own in zip(records, places, strict=True) for _ in own]
    gone = [[p] for own in places for p in own]
    if options.get("readout") == "attributed":
        whole = read_out(model, repeated, None, layers=layers, places=gone, **options)
        options["places"] = gone
    else:
        once = read_out(model, records, None, layers=layers, **options)
        whole = once.repeat_interleave(torch.tensor([len(own) for own in places]), 0)
    rows = (whole - read_out(model, repeated, gone, layers=layers, **options)).float()
    return list(rows.split([len(own) for own in places]))


def token_gradients(model: Any, record: TokenizedPair, layers: Sequence[int]) -> Tensor:
    """``[content token, layer, d_model]``: gradient of the margin by a step after each layer at one token of the prompt."""
    batch = scoring_batch(model, [record], "sum")
    shape = (*batch.ids.shape, int(model.cfg.d_model))
    with autograd(model):
        leaves = [torch.zeros(shape, device=batch.ids.device, requires_grad=True) for _ in layers]
        hooks = [(resid_post(n), _adds(leaf)) for n, leaf in zip(layers, leaves, strict=True)]
        logprobs = batch_logprobs(model, batch, hooks)
        grads = torch.autograd.grad((logprobs[:, 0] - logprobs[:, 1]).sum(), leaves)
    places = torch.tensor([p for p, keep in enumerate(record.content) if keep])
    total = torch.stack(grads).cpu()
    own = [total[:, row, int(start) + places] for row, start in enumerate(batch.offset.tolist())]
    return torch.stack(own).sum(0).transpose(0, 1).float()


def _adds(leaf: Tensor) -> Any:
    def hook_fn(act: Tensor, hook: Any) -> Tensor:
        return act + leaf.to(act.device, act.dtype)

    return hook_fn


def fisher_of(model: Any, layers: Sequence[int], file: Path, n_samples: int = N_FISHER) -> Fisher:
    """The model's Fisher samples on the neutral texts that measure no cost, kept in ``file``."""
    if file.exists():
        return Fisher.load(file).at(layers)
    rows = [prompt_ids(model, text) for text in gr.records.neutral_texts()[COST_TEXTS:]]
    fisher = Fisher.estimate(model, rows, layers=layers, n_samples=n_samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    fisher.save(file)
    return fisher
