"""Keeping a pass's memory from staying with the process: large blocks go back to the system as soon as they are free."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: ``mallopt``'s name for the size from which a block is mapped by itself.
_MMAP_THRESHOLD = -3

#: Bytes. Activations of a pass are larger; with 256 KiB a third more memory was left over.
_INSIDE = 64 * 1024

#: Bytes, the largest that glibc takes: where its own adjustment stands once a model has been loaded.
_OUTSIDE = 32 * 1024 * 1024


@contextmanager
def returned_memory() -> Iterator[None]:
    """Inside, large blocks come from the system one by one and go back to it when they are freed.

    The heap of the C library keeps freed activations between those that a backward pass still needs: the peak of a pass
    with gradients was twice the size of what it holds. Only glibc is told; a threshold from the environment stays as it is.
    """
    mallopt = None if _set_by_user() else _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _INSIDE)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _OUTSIDE)


def _set_by_user() -> bool:
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")


def _mallopt() -> Any:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
