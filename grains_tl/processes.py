"""Several processes at work on one build or sweep: who does what, and putting it together.

Start them with ``accelerate launch`` or ``torchrun``; without a launcher there is one process and nothing changes. Every
process holds the whole model and does every n-th record (or layer); results are the same for any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from grains_tl.caching import Differences, collect_with_norms
from grains_tl.masking import Selection
from grains_tl.models import require_layers
from grains_tl.tokens import TokenizedPair
from grains_tl.types import HookedModel

T = TypeVar("T")
#: Records whose activations are held at a time where only their mean is wanted.
CHUNK = 1024


@dataclass(frozen=True)
class Processes:
    """This process and how many there are.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.

    Example:
        >>> Processes(rank=1, world=3).share(8)
        [1, 4, 7]
        >>> Processes(rank=1, world=3).own_file("v.partial.jsonl")
        PosixPath('v.partial.jsonl.rank1')
    """

    rank: int = 0
    world: int = 1

    def share(self, n: int) -> list[int]:
        """Which of ``n`` items this process does: every ``world``-th, so that long and short ones spread evenly."""
        return list(range(self.rank, n, self.world))

    def own_file(self, path: str | Path) -> Path:
        """The file this process writes to; ``files`` finds those of all."""
        return Path(path) if self.world == 1 else Path(f"{path}.rank{self.rank}")

    def gather(self, mine: Sequence[T]) -> list[T]:
        """Everyone's items, rank by rank, in every process."""
        if self.world == 1:
            return list(mine)
        from accelerate.utils import gather_object

        return gather_object(list(mine))

    def gather_shares(self, mine: Sequence[T]) -> list[T]:
        """Undo ``share``: everyone's items in their first order."""
        numbered = self.gather([(self.rank + i * self.world, item) for i, item in enumerate(mine)])
        return [item for _, item in sorted(numbered, key=lambda pair: pair[0])]


#: No launcher, no one to wait for.
ALONE = Processes()


def files(path: str | Path) -> list[Path]:
    """A checkpoint and the parts of it that processes wrote, whatever their number was.

    A share that a dead process left unfinished is thereby redone, and only that, by the next run.
    """
    path = Path(path)
    return [file for file in (path, *sorted(path.parent.glob(f"{path.name}.rank*"))) if file.exists()]


def launched() -> Processes:
    """This process as the launcher numbered it; a single one if there was no launcher.

    Raises:
        ImportError: launched as several processes without the ``accelerate`` package.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    state = _state()
    return Processes(state.process_index, state.num_processes)


def launched_device() -> torch.device:
    """Where this process's model goes: the accelerator that the launcher assigned to it, or the CPU."""
    return torch.device("cpu") if launched().world == 1 else _state().device


def finish() -> None:
    """Leave the group of processes; every process, when all is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError("several processes need accelerate: pip install 'grains-tl[processes]'") from None
    return PartialState(cpu=not torch.cuda.is_available())


def shared_differences(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    selections: Sequence[Selection],
    *,
    processes: Processes = ALONE,
    mean_only: bool = False,
    **options: Any,
) -> Differences:
    """``collect_differences`` of all records, each process doing its share; the same result in every process.

    Args:
        model, tokenized, selections: all the records and what to mask in each.
        processes: this process and how many there are.
        mean_only: hold and hand over sums instead of records. The result then has one row per chunk of records, weighted
            so that the mean over its rows is the mean over the records: enough for ``reduce="mean"``, and a build of any
            number of records needs the memory of ``CHUNK`` of them.
        options: layers, masker, readout, max_tokens, progress of ``collect_differences``.

    Raises:
        ValueError: fewer records than processes.
    """
    n = len(tokenized)
    if n < processes.world:
        raise ValueError(f"{n} records for {processes.world} processes; start at most {n}")
    ups, downs, norms = [], [], []
    for part in _chunks(processes.share(n), CHUNK if mean_only else n):
        up, down, norm = collect_with_norms(
            model, [tokenized[i] for i in part], [selections[i] for i in part], **options
        )
        ups.append(up.sum(0, keepdim=True) if mean_only else up)
        downs.append(down.sum(0, keepdim=True) if mean_only else down)
        norms.append(norm)
    if mean_only:
        rows = processes.gather([(u, d) for u, d in zip(ups, downs, strict=True)])
        up, down = (torch.cat(side) * (len(rows) / n) for side in zip(*rows, strict=True))
    else:
        pairs = processes.gather_shares(list(zip(ups[0].unbind(0), downs[0].unbind(0), strict=True)))
        up, down = (torch.stack(side) for side in zip(*pairs, strict=True))
    all_norms = torch.cat(processes.gather([torch.cat(norms, dim=1)]), dim=1)
    layers = options.get("layers") or range(model.cfg.n_layers)
    return Differences(up, down, tuple(require_layers(model, layers)), all_norms.median(dim=1).values)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
