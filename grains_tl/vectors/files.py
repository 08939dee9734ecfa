"""Reading steering vectors from files: those of this package, and those of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grains_tl.types import HookedModel
from grains_tl.vectors.foreign import read_foreign
from grains_tl.vectors.hub import fetch, is_address
from grains_tl.vectors.steering_vectors import SteeringVectors


def load_vectors(
    path: str | Path, model: HookedModel | None = None, *, layers: int | Sequence[int] | None = None
) -> SteeringVectors:
    """Read vectors written by ``SteeringVectors.save`` or by another program; nothing in the file is executed.

    Of other programs it reads GGUF control vectors (llama.cpp, repeng), files of ``torch.save`` with tensors alone
    (steering-vectors' ``layer_activations``, lm-evaluation-harness' ``steered``), safetensors and NumPy files with a tensor
    per layer. Such files do not say how large the model's residuals are: give the model, on which that is measured, or
    steer with ``scale="raw"``.

    ``hf://owner/name`` is read from a Hugging Face hub (``HF_ENDPOINT``, by default huggingface.co), with ``@revision`` or
    ``/file`` behind it where they differ from the newest ``vectors.safetensors``; it stays in the hub's cache.

    Args:
        path: the file, or its address on a hub.
        model: if given, refuse vectors made for another model.
        layers: of the rows, for a file that holds a single tensor without layer numbers.

    Returns:
        ``SteeringVectors``: directions ``[layer, d_model]`` of unit length, norms in residual units.

    Raises:
        FileNotFoundError: no such file, repository or revision.
        PermissionError: a repository that this login may not read.
        ConnectionError: a hub that cannot be reached, fails, or stops half-way.
        ValueError: not such a file, a newer format version, a checksum that does not fit, broken shapes, numbers that are
            not finite, pickled objects, layers that cannot be told, or vectors of another model.

    Examples:
        >>> vectors = load_vectors("vectors.safetensors", model)     # doctest: +SKIP
        >>> vectors = load_vectors("happy.gguf", model)              # doctest: +SKIP
        >>> vectors = load_vectors("hf://owner/name", model)         # doctest: +SKIP
    """
    file = fetch(str(path)) if is_address(path) else Path(path)
    if not _is_own(file):
        return read_foreign(file, model, layers)
    if layers is not None:
        raise ValueError(f"{file} says which layers its vectors are for; leave layers out, and use vectors.at(layers)")
    return SteeringVectors.load(file, model)


def _is_own(file: Path) -> bool:
    """Whether a file is one that ``SteeringVectors.save`` wrote, or not there at all."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return True
    try:
        with safe_open(str(file), framework="pt") as handle:
            return "format" in (handle.metadata() or {}) and "resid_norms" in handle.keys()  # noqa: SIM118 (not a dict)
    except SafetensorError:
        return False
