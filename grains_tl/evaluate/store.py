"""Append-only files of finished results: a run that was killed can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grains_tl._util.files import write_atomically
from grains_tl._util.store import append_rows, read_lines, rows_of, unsealed
from grains_tl.models.identity import model_identity, same_fingerprint
from grains_tl.models.precision import autocast_dtype
from grains_tl.types import HookedModel

FORMAT = "grains_tl.results"

#: 1: rows without a checksum; still read. 2: every row has its ``crc``.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """Finished rows by key, and the file that receives further ones (none: only in memory).

    The file is jsonl: a header that names the model, then one row per result with its ``key`` and ``values``.
    """

    path: Path | None = None
    rows: dict[str, list[float]] = field(default_factory=dict)

    def append(self, rows: Sequence[tuple[str, Sequence[float], Mapping[str, Any]]]) -> None:
        """Keep finished rows ``(key, values, what a reader of the file wants to know)``; they are on disk afterwards."""
        self.rows.update((key, list(values)) for key, values, _ in rows)
        if self.path is not None:
            append_rows(self.path, [{"key": key, **about, "values": list(values)} for key, values, about in rows])


def open_checkpoint(path: str | Path | Checkpoint | None, model: HookedModel) -> Checkpoint:
    """Read a checkpoint, or begin one.

    Args:
        path: the ``.jsonl`` file; ``None`` for none; an open checkpoint is handed back.
        model: the model the results belong to.

    Raises:
        ValueError: the file is no checkpoint, or one of another model or precision; it is left as it is.
        OSError: the file cannot be written; before anything runs.
    """
    if path is None or isinstance(path, Checkpoint):
        return path or Checkpoint()
    file, identity = Path(path), model_identity(model)
    first, *lines = read_lines(file)
    header = {"format": FORMAT, "version": FORMAT_VERSION, "model": identity}
    if autocast := autocast_dtype(model):
        header["autocast"] = autocast
    if not lines and json.dumps(header).startswith(first):  # new, or killed in its first line
        write_atomically(file, (json.dumps(header) + "\n").encode())
        return Checkpoint(file)
    _require_same_model(file, header := unsealed(first, needs_crc=False) or {}, identity)
    if header.get("autocast") != autocast:
        raise ValueError(
            f"{file} holds results made {_under(header.get('autocast'))}, and this run is {_under(autocast)}; one table has "
            "one precision: give another path, or run as before"
        )
    append_rows(file, [])  # a place that cannot be written is an error before anything runs
    rows = [row for row in rows_of(lines, needs_crc=header.get("version") != 1) if _is_result(row)]
    return Checkpoint(file, {row["key"]: row["values"] for row in rows})


def _under(autocast: Any) -> str:
    return f"under {autocast} autocast" if autocast else "without autocast"


def _is_result(row: dict[str, Any]) -> bool:
    values = row.get("values")
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


def _require_same_model(file: Path, header: dict[str, Any], identity: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(f"{file} is not a checkpoint of results (unexpected first line); give another path")
    if header.get("version") not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"{file} has version {header.get('version')}, this package reads up to {FORMAT_VERSION}")
    made = header.get("model")
    if not isinstance(made, dict):
        raise ValueError(f"{file} has a broken first line (no model in it); give another path, or delete the file")
    shape = [key for key in ("n_layers", "d_model", "n_heads", "d_vocab") if made.get(key) != identity[key]]
    if shape or not _same_numbers(made.get("fingerprint"), identity["fingerprint"]):
        different = ", ".join(f"{k}: {made.get(k)} -> {identity[k]}" for k in shape) or "the weights"
        raise ValueError(
            f"{file} holds results of another model ({made.get('name')}; different: {different}); give another path, "
            "or delete the file"
        )


def _same_numbers(a: dict[str, list[float]] | None, b: dict[str, list[float]]) -> bool:
    """Stricter than ``same_fingerprint``, which lets half precision pass: rows of one table come from one model."""
    if a is None or not same_fingerprint(a, b):
        return False
    # logged with two decimals; round-off may tip the last one
    return all(abs(x - y) < 0.015 for x, y in zip(a["logprobs"], b["logprobs"], strict=True))
