"""Attribution of many records, kept in a file one by one, so that an interrupted run can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grains_tl._util.files import short_hash
from grains_tl._util.processes import ALONE, Processes, files
from grains_tl._util.store import append_rows, read_lines, require_own, rows_of
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.result import Attribution
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.inference.objectives import Objective
from grains_tl.models.identity import model_identity
from grains_tl.models.precision import autocast_dtype
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.types import HookedModel


def attribute_records(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    method: Method,
    *,
    objective: Objective = "sum",
    mask: Mask | Masker = "mean_embedding",
    checkpoint: str | Path | None = None,
    processes: Processes = ALONE,
) -> list[Attribution]:
    """``attribute_all`` that keeps finished records in a file and does not compute them again.

    Methods that take tokens out leave template tokens alone: they are never chosen, so their scores are not needed.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        tokenized: the records.
        method: the method.
        objective: as in ``attribute``.
        mask: as in ``attribute``.
        checkpoint: the ``.jsonl`` file, or ``None``.
        processes: names the part of the checkpoint that this process writes; all parts are read.

    Returns:
        One ``Attribution`` per record, in their order.

    Raises:
        ValueError: the checkpoint is a file of something else; it is left as it is.
        OSError: it cannot be written.
    """
    mask = Mask.of(mask)
    options: dict[str, Any] = {
        "method": method,
        "objective": objective,
        "mask": mask,
        "content_only": method.removes,
    }
    if checkpoint is None:
        return attribute_all(model, tokenized, **options)
    path = Path(checkpoint)
    own = processes.own_file(path)
    keys = _keys(model, recorded_options(method, objective, mask, tokenized), tokenized)
    done, todo = _state(path, keys, tokenized)
    append_rows(own, [])  # a place that cannot be written is an error before anything runs
    append = _append_to(own, done, [keys[i] for i in todo])
    attribute_all(model, [tokenized[i] for i in todo], on_result=append, **options)
    return [_restore(done[key], t) for key, t in zip(keys, tokenized, strict=True)]


def recorded_options(method: Method, objective: str, mask: Mask, tokenized: Sequence[TokenizedPair]) -> dict[str, Any]:
    """What an attribution depends on besides model and record, as checkpoints and manifests have had it since 0.1."""
    options = {**method.options(), "objective": objective, "masker": mask.text}
    group_by = getattr(method, "group_by", None)
    if group_by is not None:
        options["group_by"] = group_by
    if any(t.images is not None for t in tokenized):
        options["image_masker"] = mask.image
    return options


def seconds_spent(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    method: Method,
    objective: Objective,
    mask: Mask,
    checkpoint: str | Path,
) -> float:
    """What the records in the file took together, in whichever runs; NaN if one of them is not there."""
    keys = _keys(model, recorded_options(method, objective, mask, tokenized), tokenized)
    done, _ = _state(Path(checkpoint), keys, tokenized)
    return sum(float(done.get(key, {}).get("seconds", "nan")) for key in keys)


def image_key(pair: TokenizedPair) -> list[str]:
    """Nothing without an image: text-only hashes stay what they were."""
    return [] if pair.images is None else [pair.images.digest]


def _keys(model: HookedModel, options: dict[str, Any], tokenized: Sequence[TokenizedPair]) -> list[str]:
    identity, autocast = model_identity(model), autocast_dtype(model)
    options = options if autocast is None else {**options, "autocast": autocast}
    return [
        short_hash([identity, options, t.prompt, t.chosen, t.rejected, t.content, *image_key(t)]) for t in tokenized
    ]


def _state(
    path: Path, keys: Sequence[str], tokenized: Sequence[TokenizedPair]
) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """Finished rows by key, and the places of the records that have none."""
    done: dict[str, dict[str, Any]] = {}
    for file in files(path):
        lines = read_lines(file)
        require_own(file, lines, "attributions")
        done |= {row["key"]: row for row in rows_of(lines)}
    return done, [i for i, (key, t) in enumerate(zip(keys, tokenized, strict=True)) if not _fits(done.get(key), t)]


def _append_to(file: Path, done: dict[str, dict[str, Any]], keys: Sequence[str]) -> Callable[[int, Attribution], None]:
    before = time.perf_counter()

    def append(index: int, a: Attribution) -> None:
        nonlocal before
        now = time.perf_counter()
        row = {
            "key": keys[index],
            "scores": a.scores.tolist(),
            "gap": a.gap,
            "objective": a.objective,
            "baseline_objective": a.baseline_objective,
            "method": a.method,
            "steps": a.steps,
            "seconds": now - before,  # records of one pass come together: only their sum means something
        }
        if a.errors is not None:
            row["errors"] = a.errors.tolist()
        before = now
        append_rows(file, [row])
        done[keys[index]] = row

    return append


def _fits(row: dict[str, Any] | None, pair: TokenizedPair) -> bool:
    """Whether a row of the file can be this record's result."""
    try:
        return row is not None and len(_restore(row, pair).scores) == len(pair.prompt)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False


def _restore(row: dict[str, Any], pair: TokenizedPair) -> Attribution:
    return Attribution(
        scores=torch.tensor(row["scores"], dtype=torch.float32),
        tokens=list(pair.strings),
        content=torch.tensor(pair.content),
        is_image=torch.tensor(pair.is_image),
        gap=row["gap"],
        objective=row["objective"],
        baseline_objective=row["baseline_objective"],
        method=row["method"],
        spans=() if pair.images is None else pair.images.spans,
        steps=row.get("steps"),
        starts_word=torch.tensor(pair.starts_word, dtype=torch.bool),
        chosen=pair.responses[0],
        rejected=pair.responses[1],
        errors=None if row.get("errors") is None else torch.tensor(row["errors"], dtype=torch.float32),
    )
