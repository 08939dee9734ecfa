"""Real shapes with RANDOM weights on a GPU: time, tokens a second and peak memory of builds, a sweep and generation.

    python -m benchmarks.gpu_shapes --shape llama-3.1-8b --out llama.json
    python -m benchmarks.gpu_shapes --shape tiny --device cpu --dtype float32 --out tiny.json      # a dry run
    python -m benchmarks.gpu_shapes --predict llama.json     # anywhere: adds what grains-tl plan says of each job

Time and memory depend on the shape alone, so no weights are needed; scores and texts mean nothing. Weights are made on the
device in the dtype they will have, so that the process never needs a second copy. The paper gives 96 s for building from 50
examples on a 7B-8B model (integrated gradients, 20 steps).

``llava-1.6-7b`` is the language model alone, with words in the places of image tokens; ``qwen2.5-vl-7b`` is the whole
vision-language model with random pictures. The file of results is written after every job, so that a run that is cut off
or does not fit keeps what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import grains_tl as gr
from grains_tl.finding.planning import plan_run
from grains_tl.finding.workload import ALL_JOBS, USUAL_JOBS, Workload, random_vectors
from grains_tl.models.operations import count_operations
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.models.shapes import SHAPES, random_bridge, random_hugging_face, shape_config
from grains_tl.vectors.manifest import package_versions

PLAIN, UNSTEERED, STEERED = (f"generate, {how}" for how in ("plain Hugging Face", "unsteered", "steered"))
GENERATION = (PLAIN, UNSTEERED, STEERED)
JOBS = (*GENERATION, *USUAL_JOBS)

#: Prompts of a batch in generation.
BATCH = 8


@dataclass(frozen=True)
class Machine:
    """Where and how a shape runs.

    Attributes:
        device: where.
        dtype: name of the weights' type.
        max_tokens: token budget of one pass.
        new_tokens: of a continuation.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    max_tokens: int = 4096
    new_tokens: int = 64

    @property
    def on_gpu(self) -> bool:
        """Whether memory can be measured."""
        return torch.device(self.device).type == "cuda"

    def wait(self) -> None:
        """Until all that was started has ended."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def measured(self, job: Callable[[], Any]) -> dict[str, Any]:
        """Seconds and peak memory of a job, or that it does not fit."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures: dict[str, Any] = {"peak_gib": None}
        try:
            self.wait()
            started = time.perf_counter()
            job()
            self.wait()
            figures["seconds"] = time.perf_counter() - started
        except torch.OutOfMemoryError as error:
            figures["out_of_memory"] = str(error).partition("\n")[0]
        if self.on_gpu:
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return figures


def measure(
    shape: str, workload: Workload, machine: Machine, *, jobs: Sequence[str] = JOBS, out: Path | None = None
) -> dict[str, Any]:
    """Figures of one shape.

    Args:
        shape: one of ``SHAPES``.
        workload: records and their lengths.
        machine: where to run.
        jobs: which of ``JOBS``, and other names in ``ALL_JOBS``.
        out: a JSON file for the results, written after every job.
    """
    found: dict[str, Any] = {
        "shape": shape, "weights": "random", **asdict(machine), "device": _device_name(machine), "batch": BATCH,
        "workload": asdict(workload), "python": platform.python_version(), "versions": package_versions(), "jobs": {},
    }  # fmt: skip

    def keep(name: str, figures: dict[str, Any]) -> None:
        found["jobs"][name] = figures
        print(name, json.dumps(figures), flush=True)
        _write(out, found)

    config = shape_config(shape)
    started = time.perf_counter()
    hf_model = random_hugging_face(config, device=machine.device, dtype=getattr(torch, machine.dtype))
    found["making_seconds"] = time.perf_counter() - started
    found["weights_gib"] = sum(p.numel() * p.element_size() for p in hf_model.parameters()) / 2**30
    ids = torch.randint(3, 2000, (BATCH, workload.prompt_tokens), generator=torch.Generator().manual_seed(1))
    plain = _plain_generation(hf_model, ids.to(machine.device), machine)
    plain(2)  # the first runs pay for what later ones find ready
    if PLAIN in jobs:
        keep(PLAIN, _with_rate(machine.measured(lambda: plain(machine.new_tokens)), machine))
    model = random_bridge(hf_model, shape)
    with gr.settings(max_tokens=machine.max_tokens, progress=False):
        for name, job in _generation(model, ids, machine).items():
            if name in jobs:
                keep(name, _with_rate(machine.measured(job), machine))
        runs_plain(model)
        Workload(**{**asdict(workload), "records": 2}).jobs(model, config)["margin_gradient"]()
        known = workload.jobs(model, config)
        for name in [job for job in jobs if job in known]:
            with count_operations(model) as counts:
                figures = machine.measured(known[name])
            n_layers = int(model.cfg.n_layers)
            figures |= {"tokens": counts.forward / n_layers, "tokens_back": counts.backward / n_layers}
            figures |= {"unembedded": counts.unembedded}
            if "seconds" in figures:
                figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
            keep(name, figures)
    return found


def _plain_generation(hf_model: Any, ids: torch.Tensor, machine: Machine) -> Callable[[int], Any]:
    """Transformers' own generation; every continuation is as long as the others."""
    settings = hf_model.generation_config
    settings.min_new_tokens, settings.pad_token_id, settings.eos_token_id = machine.new_tokens, 0, 2
    mask = torch.ones_like(ids)

    def run(n: int) -> Any:
        with torch.no_grad():
            return hf_model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False
            )

    return run


def _generation(model: Any, ids: torch.Tensor, machine: Machine) -> dict[str, Callable[[], Any]]:
    """The same prompts, with and without steering at one layer."""
    prompts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    hooks = random_vectors(model).hooks(0.1, [int(model.cfg.n_layers) // 2])

    def run(fwd_hooks: Any = None) -> Any:
        return gr.generate(model, prompts, fwd_hooks, max_new_tokens=machine.new_tokens, batch_size=BATCH)

    gr.generate(model, prompts[:1], hooks, max_new_tokens=machine.new_tokens)
    return {UNSTEERED: run, STEERED: lambda: run(hooks)}


def _with_rate(figures: dict[str, Any], machine: Machine) -> dict[str, Any]:
    if "seconds" in figures:
        figures["new_tokens_per_second"] = BATCH * machine.new_tokens / figures["seconds"]
    return figures


def _device_name(machine: Machine) -> str:
    return torch.cuda.get_device_name(machine.device) if machine.on_gpu else machine.device


def _write(out: Path | None, found: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def predict(file: Path) -> dict[str, Any]:
    """Add to a file of results what the plan says of each of its jobs: tokens, operations, peak memory."""
    found = json.loads(file.read_text(encoding="utf-8"))
    jobs = [job for job in found["jobs"] if job in ALL_JOBS]
    dtype = getattr(torch, found["dtype"])
    plan = plan_run(
        found["shape"], Workload(**found["workload"]), jobs=jobs, dtype=dtype, max_tokens=found["max_tokens"]
    )
    for row in plan.table.to_dict("records"):
        found["jobs"][row.pop("job")]["predicted"] = row
    _write(file, found)
    return found


def rows(found: dict[str, Any]) -> list[str]:
    """One line per job."""
    lines = []
    for name, figures in found["jobs"].items():
        if "seconds" not in figures:
            lines.append(f"  {name:<28} out of memory")
            continue
        rate = figures.get("new_tokens_per_second") or figures.get("tokens_per_second", 0.0)
        line = f"  {name:<28} {figures['seconds']:8.2f} s  {rate:10.1f} tokens/s"
        line += "" if figures["peak_gib"] is None else f"  {figures['peak_gib']:6.1f} GiB"
        planned = figures.get("predicted")
        if planned:
            rate = planned["teraflop"] / figures["seconds"]
            line += f"  ({rate:.1f} TFLOP/s; tokens {figures['tokens']:,.0f}, planned {planned['tokens']:,.0f}; "
            line += f"memory planned {planned['peak_gib']:.1f} GiB)"
        lines.append(line)
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", default=Machine.device)
    parser.add_argument("--dtype", default=Machine.dtype, choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--max-tokens", type=int, default=Machine.max_tokens, help="tokens of one pass; half with gradients"
    )
    parser.add_argument("--new-tokens", type=int, default=Machine.new_tokens)
    for name, default in asdict(Workload()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--job", action="append", choices=(*GENERATION, *ALL_JOBS), help="only this job (repeatable)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="add the plan to a file of results; runs nothing")
    args = parser.parse_args()
    if args.predict:
        found = predict(args.predict)
    else:
        workload = Workload(**{name: getattr(args, name) for name in asdict(Workload())})
        machine = Machine(args.device, args.dtype, args.max_tokens, args.new_tokens)
        found = measure(args.shape, workload, machine, jobs=args.job or JOBS, out=args.out)
    print(f"{found['shape']}, RANDOM weights, {found['device']}, {found['dtype']}, {found['workload']}")
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
