"""llama.cpp through ctypes: the wheel ``xllamacpp`` exports its whole C interface, and needs no compiler.

No Python binding with prebuilt wheels offers control vectors, so the few calls are declared here. Parameter structs come
from llama.cpp's own defaults and are handed on as they are: as opaque blocks that are larger than any version's struct.
"""

from __future__ import annotations

import ctypes as c
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np


class Params(c.Structure):
    _fields_ = [("opaque", c.c_uint64 * 64)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.POINTER(c.c_int8)),
    ]


class ControlVector(c.Structure):
    """``common_control_vector_data``: ``{int n_embd; std::vector<float> data;}``."""

    _fields_ = [("n_embd", c.c_int), ("begin", c.c_void_p), ("end", c.c_void_p), ("room", c.c_void_p)]


class LoadInfo(c.Structure):
    """``common_control_vector_load_info``: ``{float strength; std::string fname;}``; a string begins with its pointer."""

    _fields_ = [("strength", c.c_float), ("text", c.c_char_p), ("rest_of_string", c.c_size_t * 3)]


LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class LlamaCpp:
    """One model with one context on one thread."""

    def __init__(self, gguf: Path, n_layers: int) -> None:
        spec = util.find_spec("xllamacpp")
        assert spec is not None and spec.origin is not None
        self.lib = lib = c.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        for name, result, arguments in (
            ("llama_model_default_params", Params, []),
            ("llama_context_default_params", Params, []),
            ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, Params]),
            ("llama_init_from_model", c.c_void_p, [c.c_void_p, Params]),
            ("llama_model_get_vocab", c.c_void_p, [c.c_void_p]),
            ("llama_vocab_n_tokens", c.c_int32, [c.c_void_p]),
            ("llama_set_n_threads", None, [c.c_void_p, c.c_int32, c.c_int32]),
            ("llama_get_memory", c.c_void_p, [c.c_void_p]),
            ("llama_memory_clear", None, [c.c_void_p, c.c_bool]),
            ("llama_decode", c.c_int32, [c.c_void_p, Batch]),
            ("llama_get_logits", c.POINTER(c.c_float), [c.c_void_p]),
            ("llama_log_set", None, [c.c_void_p, c.c_void_p]),
            (
                "llama_set_adapter_cvec",
                c.c_int32,
                [c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_int32, c.c_int32],
            ),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self.quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
        lib.llama_log_set(c.cast(self.quiet, c.c_void_p), None)
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(gguf).encode(), lib.llama_model_default_params())
        assert model, f"llama.cpp cannot read {gguf}"
        self.context = lib.llama_init_from_model(model, lib.llama_context_default_params())
        assert self.context
        lib.llama_set_n_threads(self.context, 1, 1)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.n_layers = n_layers

    def read_control_vector(self, path: Path, scale: float) -> tuple[int, np.ndarray]:
        """What llama.cpp's own reader makes of a file: the width, and the rows from layer 1 on, times ``scale``."""
        info = LoadInfo(scale, str(path).encode())
        # GCC's older strings are a pointer and nothing else; mangled names tell which kind a library was built with
        end = c.addressof(info) + (16 if hasattr(self.lib, "_Z14common_get_envRKSs") else c.sizeof(info))
        items = (c.c_void_p * 3)(c.addressof(info), end, end)  # a vector of one
        result = ControlVector()
        getattr(self.lib, LOAD)(c.byref(result), c.byref(items))
        n = ((result.end or 0) - (result.begin or 0)) // 4
        data = np.ctypeslib.as_array(c.cast(result.begin, c.POINTER(c.c_float)), (n,)).copy() if n else np.zeros(0)
        return result.n_embd, data.astype(np.float32)

    def steer(self, path: Path | None, scale: float = 1.0) -> None:
        """``--control-vector-scaled PATH SCALE``, or no steering."""
        if path is None:
            assert self.lib.llama_set_adapter_cvec(self.context, None, 0, 0, -1, -1) == 0
            return
        width, found = self.read_control_vector(path, scale)
        data = np.zeros(width * (self.n_layers - 1), np.float32)  # rows that are not given would stay as they were
        data[: found.size] = found
        where: Any = data.ctypes.data_as(c.c_void_p)
        assert self.lib.llama_set_adapter_cvec(self.context, where, data.size, width, 1, self.n_layers) == 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """``[pos, vocab]`` of one sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        n = len(ids)
        batch = Batch(n, (c.c_int32 * n)(*ids), None, None, None, None, (c.c_int8 * n)(*[1] * n))
        assert self.lib.llama_decode(self.context, batch) == 0
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (n, self.n_vocab)).copy()


def unquantized(gguf: Path, target: Path) -> Path:
    """The same weights in float32, as the package sees them: without llama.cpp's rounding of activations to 8 bits."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
