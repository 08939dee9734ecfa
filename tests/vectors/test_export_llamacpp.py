"""A control vector in llama.cpp itself, on the weights that the package loads (pip install xllamacpp).

On the 4-bit file llama.cpp rounds activations to 8 bits, so its logits are ours to about a tenth; the margins of records are
compared there. Logits are compared on the same weights in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import grains_tl as gr
from grains_tl.models import loading as gr_models
from grains_tl.vectors.export import export_gguf
from tests.helpers.llamacpp import LlamaCpp, unquantized

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(util.find_spec("xllamacpp") is None, reason="no llama.cpp (pip install xllamacpp)"),
]
LAYERS = [1, 15, 21, 29]
ALPHA = 0.3
CHANGE_RTOL = 0.02  # llama.cpp keeps keys and values in half precision


@pytest.fixture(scope="module")
def engine(smollm2: SimpleNamespace) -> LlamaCpp:
    gguf = gr_models._bundled_gguf()
    assert gguf is not None
    return LlamaCpp(gguf, n_layers=30)


@pytest.fixture(scope="module")
def exact_engine(engine: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    gguf = gr_models._bundled_gguf()
    assert gguf is not None
    file = unquantized(gguf, tmp_path_factory.mktemp("float32") / "smollm2-f32.gguf")
    yield LlamaCpp(file, n_layers=30)
    file.unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def vectors(smollm2: SimpleNamespace) -> gr.SteeringVectors:
    return gr.build_vectors(
        smollm2.bridge, gr.load_bundled("sentiment", "build")[:6], top_k=3, layers=LAYERS, progress=False
    )


def margins(engine: LlamaCpp, tokenized: list[Any]) -> np.ndarray:
    """log p(chosen) - log p(rejected) in nats, from the engine's logits."""
    found = []
    for pair in tokenized:
        sides = []
        for response in (pair.chosen, pair.rejected):
            logits = torch.tensor(engine.logits([*pair.prompt, *response]))[len(pair.prompt) - 1 : -1]
            sides.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().item())
        found.append(sides[0] - sides[1])
    return np.array(found)


def test_its_reader_reads_the_file(engine: LlamaCpp, vectors: gr.SteeringVectors, tmp_path: Path) -> None:
    width, data = engine.read_control_vector(export_gguf(vectors, tmp_path / "v.gguf", layers=[15, 21]), 0.5)
    assert width == 576 and data.size == 21 * 576  # rows for blocks 1 to 21
    rows = torch.tensor(data).view(21, 576)
    at = vectors.at([15, 21])
    torch.testing.assert_close(rows[[14, 20]], 0.5 * at.resid_norms[:, None] * at.directions)
    assert rows.abs().sum(1).count_nonzero() == 2


@pytest.mark.parametrize("layer", LAYERS)
def test_it_changes_the_logits_as_the_hook_does(
    exact_engine: LlamaCpp, vectors: gr.SteeringVectors, smollm2: SimpleNamespace, layer: int, tmp_path: Path
) -> None:
    """The layer numbers are the same: the change is that of our hook at this layer and not that at the next one."""
    engine = exact_engine
    ids = smollm2.tokenizer("All in all, the film was a long one and the end of it")["input_ids"]
    engine.steer(None)
    before = engine.logits(ids)
    engine.steer(export_gguf(vectors, tmp_path / "v.gguf", layers=[layer]), ALPHA)
    theirs = engine.logits(ids) - before
    engine.steer(None)
    row = vectors.at([layer])

    def change(at: int) -> np.ndarray:
        moved = gr.SteeringVectors(row.directions, (at,), row.magnitudes, row.resid_norms)
        with torch.no_grad():
            plain = smollm2.bridge(torch.tensor([ids]))[0]
            steered = smollm2.bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=moved.hooks(ALPHA, operator="add"))
        return (steered[0] - plain).numpy()

    def distance(ours: np.ndarray) -> float:
        return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))

    other = layer - 1 if layer == 29 else layer + 1
    here, beside = distance(change(layer)), distance(change(other))
    print(f"layer {layer}: relative distance {here:.3f}, {beside:.3f} to layer {other}")
    assert here < CHANGE_RTOL < 0.1 * beside


def test_it_moves_the_margin_as_the_hook_does(
    engine: LlamaCpp, vectors: gr.SteeringVectors, smollm2: SimpleNamespace, tmp_path: Path
) -> None:
    pairs = gr.load_bundled("sentiment", "test")[:12]
    tokenized = gr.tokens.tokenize_pairs(smollm2.bridge, pairs)
    file = export_gguf(vectors, tmp_path / "v.gguf", layers=[21])
    engine.steer(None)
    base = margins(engine, tokenized)
    for alpha in (-ALPHA, ALPHA):
        engine.steer(file, alpha)
        theirs = margins(engine, tokenized) - base
        frame = gr.sweep(smollm2.bridge, vectors, pairs, layers=[21], alphas=[alpha], operator="add", progress=False)
        ours, se = float(frame["effect"].iloc[0]), theirs.std(ddof=1) / len(theirs) ** 0.5
        print(f"alpha {alpha:+}: llama.cpp {theirs.mean():+.3f} +- {se:.3f} nats, hook {ours:+.3f}, n = {len(theirs)}")
        assert (np.sign(theirs) == np.sign(alpha)).mean() > 0.9
        assert abs(theirs.mean() - ours) < 0.1 * abs(ours)
    engine.steer(None)
