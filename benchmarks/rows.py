"""One line of the table of figures, and where its time goes."""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

#: What PyTorch's operations count as; everything else of theirs is element by element, or copies.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"),
    "attention": ("aten::_scaled_dot_product",),
}


@dataclass(frozen=True)
class Row:
    """Our cost of some work beside a peer's.

    Attributes:
        work: what is done.
        ours: our cost.
        peer: who else does it.
        theirs: the peer's cost of the same work.
        aim: what was wanted of ``theirs / ours``, or of ``ours`` itself.
        unit: of both costs.
        agreement: how far the results are the same, where they can be compared.
        rest: where our time goes.
    """

    work: str
    ours: float
    peer: str
    theirs: float
    aim: str = ""
    unit: str = "s"
    agreement: str = ""
    rest: str = ""

    @property
    def ratio(self) -> str:
        """How many times the peer's cost is ours; of memory, how much more ours is."""
        if self.unit == "MiB":
            return f"{self.ours / self.theirs - 1:+.0%}"
        return f"{self.theirs / self.ours:.2f}"

    def costs(self) -> tuple[str, str]:
        """Both costs as they are shown."""
        digits = 0 if self.unit == "MiB" else 2
        return f"{self.ours:.{digits}f} {self.unit}", f"{self.theirs:.{digits}f} {self.unit}"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as a file keeps them."""
    return [asdict(row) for row in rows]


def torch_shares(job: Callable[[], Any]) -> str:
    """Shares of a run's time by kind of operation; what PyTorch does not count is Python.

    The profiler counts seconds on the wall and costs some itself, most of it in Python: shares are rough.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        job()
        total = time.perf_counter() - started
    shares: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        kinds = [kind for kind, names in GROUPS.items() if event.key.startswith(names)]
        own = event.self_cpu_time_total / 1e6
        shares[kinds[0] if kinds else "other operations"] += own if event.key.startswith("aten::") else 0.0
    shares["Python and the rest"] = max(0.0, total - sum(shares.values()))
    return listed({kind: seconds / total for kind, seconds in shares.items()})


def python_shares(job: Callable[[], Any], top: int = 3) -> str:
    """The functions that take most of a run, by themselves."""
    found = cProfile.Profile()
    found.runcall(job)
    stats = pstats.Stats(found)
    total = stats.total_tt  # type: ignore[attr-defined]
    own: dict[str, float] = defaultdict(float)
    for (file, _, name), (_, _, seconds, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        # a name alone of what is built in, with its module of what is written in Python
        own[f"{Path(file).stem.strip('<>')}.{name}" if file != "~" else name.removeprefix("<").removesuffix(">")] += (
            seconds
        )
    return listed(
        {
            name.replace("built-in method ", ""): s / total
            for name, s in sorted(own.items(), key=lambda one: -one[1])[:top]
        }
    )


def listed(shares: dict[str, float]) -> str:
    """Largest first."""
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda one: -one[1]))


def load_average() -> float | None:
    """Of the last minute; ``None`` where the system has none."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
