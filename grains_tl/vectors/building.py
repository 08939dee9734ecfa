"""The building records, and what recipes read from the model on them, once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.processes import ALONE, Processes
from grains_tl.hooks.sites import Site, site_width
from grains_tl.inference.logprobs import score_pairs
from grains_tl.inference.objectives import margins
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel
from grains_tl.vectors.readout import read_out, read_out_responses


@dataclass(frozen=True)
class BuildingRecords:
    """The building records, and what recipes read from the model on them: each quantity is run once, when first used.

    Attributes:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records from ``tokenize_pairs``.
        layers: which layers, in increasing order.
        checkpoint: a file for finished results, or ``None``.
        processes: this process and how many there are.
        site: the activation of each block that is read, and that the vectors will be added to.

    Examples:
        >>> records = BuildingRecords(model, tokenize_pairs(model, pairs), (12,))     # doctest: +SKIP
        >>> records.response_differences.mean(0).shape                               # doctest: +SKIP
        torch.Size([1, 576])
    """

    model: HookedModel
    tokenized: Sequence[TokenizedPair]
    layers: tuple[int, ...]
    checkpoint: str | Path | None = None
    processes: Processes = ALONE
    site: Site = "resid_post"

    @property
    def width(self) -> int:
        """Length of a vector: ``d_model``, at ``"z"`` ``n_heads * d_head``."""
        return site_width(self.model, self.site)

    @cached_property
    def _prompts(self) -> tuple[Float[Tensor, "record layer width"], Float[Tensor, "layer"]]:
        norms: list[Tensor] = []
        ends = read_out(self.model, self.tokenized, layers=self.layers, norms=norms, site=self.site)
        return ends, torch.cat(norms, dim=1).median(dim=1).values

    @property
    def prompt_ends(self) -> Float[Tensor, "record layer width"]:
        """Residuals at the last prompt token."""
        return self._prompts[0]

    @property
    def resid_norms(self) -> Float[Tensor, "layer"]:
        """Median residual norm over the prompts' content tokens, the unit of ``alpha``."""
        # every pass over the prompts shows them
        return self._responses[1] if "_responses" in self.__dict__ else self._prompts[1]

    @cached_property
    def _responses(self) -> tuple[Float[Tensor, "record 2 layer width"], Float[Tensor, "layer"]]:
        norms: list[Tensor] = []
        ends = read_out_responses(self.model, self.tokenized, layers=self.layers, norms=norms, site=self.site)
        return ends, torch.cat(norms, dim=1).median(dim=1).values

    @property
    def response_differences(self) -> Float[Tensor, "record layer width"]:
        """h(prompt + chosen) - h(prompt + rejected) at the last response token."""
        ends = self._responses[0]
        return ends[:, 0] - ends[:, 1]

    def part(self, places: Sequence[int]) -> BuildingRecords:
        """Some of the records; what is read from the model on all of them is not read again.

        The unit of ``alpha`` stays that of all records, so that one alpha is the same step for every part.

        Args:
            places: which records, by their place.

        Returns:
            Building records of their own.
        """
        own = [self.tokenized[i] for i in places]
        return _Part(self.model, own, self.layers, self.checkpoint, self.processes, whole=self, places=tuple(places))

    @cached_property
    def margins(self) -> Float[Tensor, "record"]:
        """log p(chosen) - log p(rejected) of the unsteered model, nats."""
        return margins(score_pairs(self.model, self.tokenized))


@contextlib.contextmanager
def record_file(path: str | Path | None) -> Iterator[Path]:
    """Where recipes keep what they found on each record, so that no part of the records is gone through twice.

    Args:
        path: the file; ``None`` for one that is removed at the end.

    Yields:
        The file.
    """
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "records.jsonl"


@dataclass(frozen=True)
class _Part(BuildingRecords):
    """Some of the records of another value, which reads what the parts share."""

    whole: BuildingRecords | None = None
    places: tuple[int, ...] = ()

    @property
    def _all(self) -> BuildingRecords:
        assert self.whole is not None
        return self.whole

    @cached_property
    def _prompts(self) -> tuple[Float[Tensor, "record layer d_model"], Float[Tensor, "layer"]]:
        ends, norms = self._all._prompts
        return ends[list(self.places)], norms

    @cached_property
    def _responses(self) -> tuple[Float[Tensor, "record 2 layer d_model"], Float[Tensor, "layer"]]:
        ends, norms = self._all._responses
        return ends[list(self.places)], norms

    @property
    def resid_norms(self) -> Float[Tensor, "layer"]:
        """Of all records."""
        return self._all.resid_norms

    @cached_property
    def margins(self) -> Float[Tensor, "record"]:
        """Of these records."""
        return self._all.margins[list(self.places)]
