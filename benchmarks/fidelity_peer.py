"""One engine's log-probabilities, in an interpreter of its own: ``fidelity_peer.py ENGINE MODEL_FOLDER IN.npz OUT.npz``.

IN.npz holds the token ids of each prompt (``ids_0``, ...) and the vector to be added after each block (``row_12``, ...);
OUT.npz gets log-probabilities ``[pos, vocab]`` without (``base_0``, ...) and with the vectors (``steered_0``, ...). Nothing
of grains_tl is imported, so any environment with the engine will do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = Mapping[int, Tensor]


def logprobs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0].float().log_softmax(-1)


def plain_hooks(model: Any, rows: Rows) -> AbstractContextManager[Any]:
    """PyTorch forward hooks, as one writes them by hand."""

    @contextmanager
    def steered() -> Any:
        def adding(row: Tensor) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

            return hook

        handles = [model.model.layers[layer].register_forward_hook(adding(row)) for layer, row in rows.items()]
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    return steered()


def steering_vectors(model: Any, rows: Rows) -> AbstractContextManager[Any]:
    from steering_vectors import SteeringVector

    @contextmanager
    def steered() -> Any:
        with SteeringVector(dict(rows), "decoder_block").apply(model):
            yield model

    return steered()


def repeng(model: Any, rows: Rows) -> AbstractContextManager[Any]:
    np.__dict__.setdefault("float_", np.float64)  # repeng 0.4 names it, numpy 2 does not
    from repeng import ControlModel, ControlVector

    @contextmanager
    def steered() -> Any:
        control = ControlModel(model, list(rows))
        control.set_control(ControlVector("llama", {layer: row.numpy() for layer, row in rows.items()}), 1.0)
        try:
            yield control
        finally:
            control.reset()
            control.unwrap()

    return steered()


def nnsight(model: Any, rows: Rows) -> AbstractContextManager[Any]:
    """A model whose ``model(ids)`` is a trace of nnsight that adds to the outputs of the decoder layers."""
    from nnsight import NNsight

    traced = NNsight(model)

    class Traced:
        def __call__(self, ids: Tensor) -> Any:
            with traced.trace(ids):
                for layer, row in sorted(rows.items()):
                    block = traced.model.layers[layer]
                    if isinstance(block.output, tuple):
                        block.output = (block.output[0] + row, *block.output[1:])
                    else:
                        block.output = block.output + row
                saved = traced.output.save()
            return saved  # noqa: RET504 (it has a value only after the trace)

    return nullcontext(Traced())


ENGINES: dict[str, Callable[[Any, Rows], AbstractContextManager[Any]]] = {
    "plain hooks": plain_hooks,
    "steering-vectors": steering_vectors,
    "repeng": repeng,
    "nnsight": nnsight,
}


def main(engine: str, folder: str, source: str, target: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with np.load(source) as file:
        given = {name: torch.from_numpy(file[name]) for name in file.files}
    rows = {int(name[4:]): row for name, row in given.items() if name.startswith("row_")}
    prompts = {name[4:]: ids for name, ids in given.items() if name.startswith("ids_")}
    found = {f"base_{name}": logprobs(model, ids).numpy() for name, ids in prompts.items()}
    with ENGINES[engine](model, rows) as steered:
        found |= {f"steered_{name}": logprobs(steered, ids).numpy() for name, ids in prompts.items()}
    again = {f"base_{name}": logprobs(model, ids).numpy() for name, ids in prompts.items()}
    assert all(np.array_equal(found[name], value) for name, value in again.items()), "hooks were left on the model"
    np.savez(target, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
