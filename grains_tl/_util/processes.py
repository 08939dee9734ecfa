"""Several processes at work on one build or sweep: who does what, and putting it together.

Start them with ``accelerate launch`` or ``torchrun``; without a launcher there is one process and nothing changes. Every
process holds the whole model and does every n-th record (or layer); results are the same for any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and how many there are.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.

    Examples:
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
