"""Jacobian lenses of TransformerLens: reading one from a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


def load_lens(path: str | Path) -> Any:
    """A ``JacobianLens`` from the file that its ``save`` wrote, or one published in the reference format.

    Args:
        path: a ``.pt`` file; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ImportError: TransformerLens before 4.3.
        ValueError: not such a file.
    """
    try:
        from transformer_lens.tools.analysis import JacobianLens
    except ImportError:
        raise ImportError(
            "Jacobian lenses need TransformerLens 4.3 or later: pip install 'transformer-lens>=4.3'"
        ) from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; write one with lens.save(path)")
    try:
        return JacobianLens.load(str(path))
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a readable Jacobian lens: {said}") from None
