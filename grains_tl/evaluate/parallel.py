"""A sweep dealt out to several processes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from grains_tl._util.files import write_atomically
from grains_tl._util.processes import ALONE, Processes, files
from grains_tl.evaluate.settings import Vectors, named_vectors
from grains_tl.evaluate.sweeps import sweep
from grains_tl.models.running import require_layers
from grains_tl.records.splits import Record
from grains_tl.types import HookedModel


def shared_sweep(
    model: HookedModel,
    vectors: Vectors,
    pairs: Iterable[Record],
    *,
    processes: Processes = ALONE,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """``sweep`` with the layers dealt out to the processes; the whole table in every process.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: one, or several by name.
        pairs: the records to measure on.
        processes: this process and how many there are.
        checkpoint: as in ``sweep``; each process keeps a part of its own beside it while it works. What a dead process
            finished is taken over by the next run, with any number of processes.
        options: the other keyword arguments of ``sweep``.

    Returns:
        The table of ``sweep``: one row per setting, effects in nats; the same in every process.

    Raises:
        ValueError: fewer layers than processes, or whatever ``sweep`` refuses.

    Examples:
        >>> frame = shared_sweep(model, vectors, pairs, processes=launched())     # doctest: +SKIP
    """
    named = named_vectors(vectors)
    chosen = options.pop("layers", None)
    layers = require_layers(model, [layer for v in named.values() for layer in v.layers] if chosen is None else chosen)
    if len(layers) < processes.world:
        raise ValueError(f"{len(layers)} layers for {processes.world} processes; start at most {len(layers)}")
    own = None if checkpoint is None else processes.own_file(checkpoint)
    if checkpoint is not None and own is not None:
        _join(checkpoint, own)
    # neighbours go to different processes: a low layer costs more than a high one
    mine = [layers[i] for i in processes.share(len(layers))]
    part_of = named
    if chosen is None:  # vectors need not have the same layers
        stored = {name: [layer for layer in v.layers if layer in mine] for name, v in named.items()}
        part_of = {name: named[name].at(at) for name, at in stored.items() if at}
    part = sweep(model, part_of, pairs, layers=None if chosen is None else mine, checkpoint=own, **options)
    if processes.world == 1:
        return part
    parts = processes.gather([part])
    if processes.rank == 0 and checkpoint is not None:
        _join(checkpoint, Path(checkpoint))
    frame = pd.concat(parts, ignore_index=True)
    order = ["vector", "positions"]
    listed = {"vector": list(named), "positions": parts[0]["positions"].unique()}
    first = {column: {value: i for i, value in enumerate(listed[column])} for column in order}
    frame = frame.sort_values(
        [*order, "layer"],
        key=lambda c: c.map(first[c.name]) if c.name in first else c,
        kind="stable",
        ignore_index=True,
    )
    frame.attrs = dict(part.attrs)
    for name in ("token_layers", "from_checkpoint"):
        frame.attrs[name] = sum(p.attrs[name] for p in parts)
    # the loop would run the unsteered model once, not once per process
    one_pass = part.attrs["naive_token_layers"] // (len(part) + 1)
    frame.attrs["naive_token_layers"] = one_pass * (len(frame) + 1)
    return frame


def _join(checkpoint: str | Path, target: Path) -> None:
    """Write all finished rows, whichever process kept them, to one file; the main one replaces its parts."""
    found = files(checkpoint)
    if found in ([], [target]):
        return
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in found]
    lines = dict.fromkeys(line for text in texts for line in text.split("\n")[1:-1])  # a torn last line stays behind
    header = texts[0].partition("\n")[0]
    write_atomically(target, "\n".join([header, *lines, ""]).encode())
    if target == Path(checkpoint):
        for part in found:
            if part != target:
                part.unlink()
