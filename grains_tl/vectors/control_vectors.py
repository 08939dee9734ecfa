"""Writing GGUF control vectors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from grains_tl._util.files import cannot_write


def write_control_vector(path: str | Path, rows: Mapping[int, Tensor], texts: Mapping[str, str]) -> Path:
    """Write rows ``[d_model]`` by layer and entries of text into a GGUF file: whole or not at all.

    Raises:
        ImportError: without the ``gguf`` package.
        OSError: no space, no permission, ...; the former file is unchanged.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ImportError("writing a .gguf file needs the gguf package: pip install 'grains-tl[smollm2]'") from None
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        writer = GGUFWriter(temporary, "controlvector")
        for name, text in texts.items():
            writer.add_string(name, text)
        writer.add_uint32("controlvector.layer_count", len(rows))
        for layer, row in rows.items():
            writer.add_tensor(f"direction.{layer}", row.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(error, target, "an existing file is unchanged") from error
        raise
    return target
