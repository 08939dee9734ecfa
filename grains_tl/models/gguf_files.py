"""GGUF files as Hugging Face models: converted once, kept in a cache folder, read from there afterwards.

transformers parses the file four times and rebuilds the tokenizer entry by entry, minutes for a vocabulary of 256,000.
Here it is parsed once, and the float32 weights and the tokenizer are kept under ``~/.cache/grains_tl`` (or where the
environment variable ``GRAINS_TL_CACHE`` says).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from grains_tl._util.files import sha256_of
from grains_tl._util.settings import current
from grains_tl._util.warn import warn_caller

CACHE_VARIABLE = "GRAINS_TL_CACHE"
MANIFEST = "grains_tl.json"
LEFTOVER_SECONDS = 24 * 3600

#: What tokenizers are compared on before a converted one is trusted.
SAMPLES = ("The capital of France is", " leading space", "Grüße, 世界! 🙂", "def f(x):\n    return x  # 1234", "")


def cache_folder() -> Path:
    """Where converted models are kept: ``$GRAINS_TL_CACHE``, else ``grains_tl`` in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grains_tl"


def load_gguf(path: Path, dtype: torch.dtype, sha256: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, any architecture that transformers reads.

    The first time the file is converted, which shows its progress and says where the copy is kept and how large it is.
    Where the cache cannot be written the converted model is used all the same, with a warning.

    Args:
        path: the file.
        dtype: of the weights.
        sha256: of the file, if it was computed already.

    Returns:
        ``(model, tokenizer)`` of transformers.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: no GGUF file, or an architecture that transformers does not read.
    """
    if util.find_spec("gguf") is None:
        raise ImportError("reading a .gguf file needs the gguf package: pip install 'grains-tl[smollm2]'")
    folder = (
        cache_folder()
        / f"{path.stem}-{(sha256 or sha256_of(path))[:16]}-transformers{metadata.version('transformers')}"
    )
    if _is_whole(folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    _say(f"converting {path.name}, once; this takes up to a few minutes")
    model, tokenizer = _convert(path)
    try:
        size = _keep(model, tokenizer, folder)
        _say(f"kept {size / 1e9:.2f} GB in {folder}; delete it freely, or set {CACHE_VARIABLE} to keep it elsewhere")
    except (OSError, ValueError) as error:
        warn_caller(f"the converted model was not kept, the next load converts again: {error}")
    return model.to(dtype), tokenizer


def joined_file(name: str, packages: tuple[str, ...], sha256: str) -> Path | None:
    """The GGUF file that installed wheels hold in parts, put together in the cache; ``None`` if they are not installed.

    Raises:
        ValueError: the parts are not those that ``sha256`` was computed from.
    """
    target = cache_folder() / f"{name}-{sha256[:16]}.gguf"
    if target.exists():
        return target
    try:
        parts = [_data_file(package) for package in packages]
    except metadata.PackageNotFoundError:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as out:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != sha256:
        Path(out.name).unlink()
        raise ValueError(
            f"the wheels {packages} hold a different file from the one expected (sha256 {digest.hexdigest()})"
        )
    Path(out.name).replace(target)
    return target


def _data_file(package: str) -> Path:
    files = [Path(str(f.locate())) for f in metadata.files(package) or []]
    return max(files, key=lambda f: f.stat().st_size if f.exists() else 0)


def _say(text: str) -> None:
    if current().progress:
        print(f"grains-tl: {text}", file=sys.stderr, flush=True)


def _convert(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # the tensors are plain float32 by now; these marks would forbid saving and moving them
    model.hf_quantizer, model.is_quantized = None, False
    for owner, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if mark in vars(owner):
            delattr(owner, mark)
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, folder: Path) -> int:
    """Write a converted model into the cache, whole or not at all; the number of bytes."""
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if shutil.disk_usage(folder.parent).free < 1.1 * needed + (64 << 20):
        raise OSError(f"{needed / 1e9:.2f} GB are needed in {folder.parent}, and there is less free")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        again = AutoTokenizer.from_pretrained(temporary)
        if any(again(text)["input_ids"] != tokenizer(text)["input_ids"] for text in SAMPLES):
            raise ValueError("its tokenizer changes when it is saved and read again")
        files = {f.name: [f.stat().st_size, _crc32(f)] for f in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=1))
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first: its copy is as good
            if not _is_whole(folder):
                raise
        return sum(size for size, _ in files.values())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Delete what processes that were killed left of this copy; not what is under a day old, it may be in the making."""
    for left in folder.parent.glob(f".{escape(folder.name)}.*"):
        with suppress(OSError):  # another process deletes it, too
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds what was written, by size and checksum."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / n).stat().st_size == size and _crc32(folder / n) == crc for n, (size, crc) in files.items()
        )
    except (OSError, ValueError):
        return False


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers opens a GGUF file once for every part of the model; here each time it gets the same reader."""
    import gguf

    library: Any = gguf
    own, readers = library.GGUFReader, {}

    def reader(path: Any, *args: Any, **options: Any) -> Any:
        key = str(path)
        if key not in readers:
            readers[key] = _fast_reader(own)(path, *args, **options)
        return readers[key]

    library.GGUFReader = reader
    try:
        yield
    finally:
        library.GGUFReader = own


def _fast_reader(base: Any) -> Any:
    """A reader that does not make a memory map of every string of the vocabulary."""
    import numpy as np
    from gguf import GGUFValueType

    class Reader(base):
        def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I" or sys.byteorder != "little":
                return super()._get_field_parts(orig_offs, raw_type)
            start = int(orig_offs)
            memory = memoryview(self.data)
            kind, n = (np.frombuffer(memory, dtype, 1, start + at) for dtype, at in (("<u4", 0), ("<u8", 4)))
            inner, at = GGUFValueType(int(kind[0])), start + 12
            if inner == GGUFValueType.STRING:
                parts: list[Any] = []
                for _ in range(int(n[0])):
                    length = np.frombuffer(memory, "<u8", 1, at)
                    parts += [length, np.frombuffer(memory, np.uint8, int(length[0]), at + 8)]
                    at += 8 + int(length[0])
                places = list(range(3, 2 + len(parts), 2))
            elif inner in self.gguf_scalar_to_np:
                values = np.frombuffer(memory, self.gguf_scalar_to_np[inner], int(n[0]), at)
                parts = [values[i : i + 1] for i in range(len(values))]
                at, places = at + values.nbytes, list(range(2, 2 + len(parts)))
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            types = [GGUFValueType.ARRAY, inner] if parts else [GGUFValueType.ARRAY]
            return at - start, [kind, n, *parts], places, types

    return Reader
