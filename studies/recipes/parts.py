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
        gradients: ``[record, layer, d_model]`` of the margin.
        caa: ``[record, layer, d_model]`` response-end differences.
        norms: ``[layer]``, the unit of alpha.
        seconds: CPU seconds per record for each kind.
    """

    scores: list[Tensor]
    masked: list[Tensor]
    gradients: Tensor
    caa: Tensor
    norms: Tensor
    seconds: dict[str, float]

    def of(self, records: Sequence[int]) -> Parts:
        """The contributions of some records."""
        rows = list(records)
        return self._replace(
            scores=[self.scores[i] for i in rows if self.scores],
            masked=[self.masked[i] for i in rows if self.masked],
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
    half: bool = True,
    masking: bool = True,
) -> Parts:
    """Every record's contributions, from ``file`` if it is of these records and layers.

    Args:
        model: the model.
        pairs: the pool of building records.
        layers: candidate layers.
        file: where to keep them (tens of MB).
        half: run the masked prompts in bfloat16 autocast.
        masking: with leave-one-out scores and masked prompts, which take most of the time.
    """
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
    if masking:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            with timed(seconds, "leave_one_out", n):
                places = [[[p] for p, keep in enumerate(t.content) if keep] for t in tokenized]
                found, _ = leave_out_scores(model, tokenized, places, objective="sum", mask="mean_embedding")
            with timed(seconds, "masked_prompts", n):
                masked = [masked_differences(model, t, layers) for t in tokenized]
        scores = [s[torch.tensor(t.content)] for s, t in zip(found, tokenized, strict=True)]
    parts = Parts(scores, masked, gradients, caa, norms, seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": key, **parts._asdict()}, file)
    return parts


def masked_differences(model: Any, record: TokenizedPair, layers: Sequence[int], **options: Any) -> Tensor:
    """``[content token, layer, d_model]``: read-out of the whole prompt minus that without the token."""
    places = [p for p, keep in enumerate(record.content) if keep]
    rows = read_out(model, [record] * (len(places) + 1), [[], *([p] for p in places)], layers=layers, **options)
    return (rows[:1] - rows[1:]).float()


def fisher_of(model: Any, layers: Sequence[int], file: Path, n_samples: int = N_FISHER) -> Fisher:
    """The model's Fisher samples on the neutral texts that measure no cost, kept in ``file``."""
    if file.exists():
        return Fisher.load(file).at(layers)
    rows = [prompt_ids(model, text) for text in gr.records.neutral_texts()[COST_TEXTS:]]
    fisher = Fisher.estimate(model, rows, layers=layers, n_samples=n_samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    fisher.save(file)
    return fisher
