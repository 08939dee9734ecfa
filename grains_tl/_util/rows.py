"""Finished results in a file, row by row, with their numbers in float32: what a killed run leaves is used by the next."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.processes import ALONE, Processes, files
from grains_tl._util.store import append_rows, read_lines, require_own, rows_of


@dataclass(frozen=True)
class TensorRows:
    """Rows by key; each holds some tensors and whatever else JSON can hold.

    The file may hold rows of other kinds (attributions): they are left alone. Torn and damaged rows are skipped.

    Attributes:
        path: the ``.jsonl`` file that receives new rows; ``None`` keeps them in memory only.
        rows: what is there, the last row of each key.

    Examples:
        >>> rows = TensorRows()
        >>> rows.append("a", {"v": torch.tensor([0.1])}, step=3)
        >>> rows.tensors("a")["v"], rows.rows["a"]["step"]
        (tensor([0.1000]), 3)
    """

    path: Path | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None, processes: Processes = ALONE) -> TensorRows:
        """Read a checkpoint and the parts of it that processes wrote, or begin one.

        Args:
            path: the file, or ``None``.
            processes: names the part that this process writes to.

        Raises:
            ValueError: the file holds something else; it is left as it is.
            OSError: the file cannot be written; before anything runs.
        """
        if path is None:
            return cls()
        own = processes.own_file(path)
        rows: dict[str, dict[str, Any]] = {}
        for file in files(path):
            lines = read_lines(file)
            require_own(file, lines, "results")
            rows |= {row["key"]: row for row in rows_of(lines) if isinstance(row.get("float32"), dict)}
        append_rows(own, [])
        return cls(own, rows)

    def append(self, key: str, tensors: Mapping[str, Tensor], **about: Any) -> None:
        """Keep a row; it is on disk afterwards.

        Raises:
            OSError: no space, no permission, ...; the rows before are safe.
        """
        row = {"key": key, **about, "float32": {name: _packed(tensor) for name, tensor in tensors.items()}}
        self.rows[key] = row
        if self.path is not None:
            append_rows(self.path, [row])

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a row; none if it is not there or is not one of ours."""
        try:
            return {name: _unpacked(packed) for name, packed in self.rows[key]["float32"].items()}
        except (KeyError, TypeError, ValueError, RuntimeError):
            return {}

    def keep_layers(self, key: str, tensor: Float[Tensor, "*shape layer d_model"], layers: Sequence[int]) -> None:
        """Keep a tensor whose last axis but one is layers."""
        self.append(key, {"by_layer": tensor}, layers=list(layers))

    def of_layers(self, key: str, layers: Sequence[int]) -> Float[Tensor, "*shape layer d_model"] | None:
        """What ``keep_layers`` kept, for some of its layers; ``None`` if it is not there or lacks one of them.

        Examples:
            >>> rows = TensorRows()
            >>> rows.keep_layers("a", torch.eye(3), [4, 5, 6])
            >>> rows.of_layers("a", [6, 4]).tolist(), rows.of_layers("a", [7])
            ([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], None)
        """
        kept = self.tensors(key).get("by_layer")
        have = self.rows.get(key, {}).get("layers")
        if kept is None or not isinstance(have, list) or kept.shape[-2] != len(have) or not set(layers) <= set(have):
            return None
        return kept[..., [have.index(layer) for layer in layers], :]


def _packed(tensor: Tensor) -> dict[str, Any]:
    own = tensor.detach().to("cpu", torch.float32).contiguous()
    return {"shape": list(own.shape), "base64": base64.b64encode(own.numpy().astype("<f4").tobytes()).decode()}


def _unpacked(packed: Mapping[str, Any]) -> Tensor:
    content = bytearray(base64.b64decode(packed["base64"], validate=True))
    return torch.frombuffer(content, dtype=torch.float32).reshape(packed["shape"]).clone()
