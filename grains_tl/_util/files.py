"""Files that others rely on: written whole or not at all, with a checksum of what they say."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any


def short_hash(value: Any) -> str:
    """Of anything JSON can hold; what it cannot is an error, so that two different things never share a hash."""
    return _digest(value, plain)


def hash_of(value: Any) -> str:
    """A short, stable name for anything that JSON can hold.

    Examples:
        >>> hash_of([1, "a"]) == hash_of((1, "a"))
        True
    """
    return _digest(value, str)


def _digest(value: Any, default: Callable[[Any], Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()[:16]


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write beside the target and rename: a reader sees the old file or the new one, never half of it.

    Raises:
        OSError: no space, no permission, ...: naming the target, whose former content is unchanged.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # a temporary file is private, a result is not
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(error, target, "the existing file is unchanged") from error
        raise
    return target


def cannot_write(error: OSError, path: Path, safe: str) -> OSError:
    """The same kind of error, saying which file, what is safe, and what to do."""
    reason = error.strerror or str(error)
    return type(error)(error.errno, f"{reason}: cannot write; {safe}. Free some space, or give another path", str(path))


def plain(value: Any) -> Any:
    """For ``json.dumps(default=plain)``: arrays and tensors as lists, sets sorted, paths as text.

    Raises:
        TypeError: anything else that JSON cannot hold.

    Examples:
        >>> import json, numpy as np
        >>> json.dumps({"k": np.int64(3)}, default=plain)
        '{"k": 3}'
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{value!r} cannot be written as JSON: it is a {type(value).__name__}")


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
