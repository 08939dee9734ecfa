"""A plan from a shape alone says what the package then runs on the real model, and the memory that it takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.attribution.methods import METHODS
from grains_tl.cli.main import main
from grains_tl.finding import Workload, plan_run
from grains_tl.finding.workload import ALL_JOBS, random_vectors
from grains_tl.models.plain_blocks import runs_plain
from grains_tl.models.shapes import SHAPES, random_bridge, random_hugging_face, shape_config

#: From the model cards: weights, those of tied tables once.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llava-1.6-7b": 7_241_732_096 + 64 * 2 * 4096,  # Mistral-7B with 64 more tokens
    "qwen2.5-vl-7b": 8_292_166_656,
    "smollm2": 134_515_008,
    "gemma3-270m": 268_098_176,
    "qwen2.5-0.5b": 494_032_768,
}

#: Not the stand-in's width, depth or weights.
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 700, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
WORK = Workload(records=2, prompt_tokens=13, response_tokens=4, steps=2, alphas=3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_weights(name: str) -> None:
    model = random_hugging_face(shape_config(name), device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert set(SHAPES) == {*PUBLISHED, "tiny"}


@contextmanager
def tokens_through(hf_model: Any) -> Iterator[list[int]]:
    """Tokens through all decoder layers, counted in PyTorch's own linear function (one up-projection per layer)."""
    counted, width = [0], hf_model.config.intermediate_size
    own = torch.nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if weight.shape == (width, hf_model.config.hidden_size):
            counted[0] += x.numel() // x.shape[-1]
        return own(x, weight, bias)

    torch.nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield counted
    finally:
        torch.nn.functional.linear = own


@pytest.fixture(scope="module")
def real() -> Any:
    return random_bridge(random_hugging_face(shape_config(CONFIG)))


@pytest.fixture(scope="module")
def plan() -> Any:
    return plan_run(CONFIG, WORK, jobs=ALL_JOBS, max_tokens=100).table.set_index("job")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("job", ALL_JOBS)
def test_planned_tokens_are_those_that_run(real: Any, plan: Any, job: str) -> None:
    text = [
        [" ".join(f"w{i}" for i in ids) for ids in (t.prompt[1:], t.chosen, t.rejected)]
        for t in WORK.records_for(real.original_model.config)
    ]
    pairs = [gr.PreferencePair(prompt=f"<bos> {p}", chosen=f" {c}", rejected=f" {r}") for p, c, r in text]
    steps: dict[str, Any] = (
        {"n_steps": WORK.steps} if "n_steps" in (METHODS[job].field_names() if job in METHODS else ()) else {}
    )
    runs_plain(real)
    with tokens_through(real.original_model) as counted, gr.settings(max_tokens=100, progress=False):
        if job == "sweep":
            gr.sweep(real, random_vectors(real), pairs, alphas=[0.1, 0.2, 0.3])
        elif job in METHODS:
            gr.build_vectors(real, pairs, method=job, **steps)
        else:
            gr.build_vectors(real, pairs, recipe=job)
    # two products of that shape in every block: gate and up; in LeaveOneOut's branches the last block reads few places
    layers = CONFIG["num_hidden_layers"]
    ran, planned = counted[0] / 2 / layers, plan["tokens"][job]
    if job in ("leave_one_out", "leave_k_out"):
        assert planned * (1 - 1 / layers) <= ran <= planned
    else:
        assert ran == planned


def test_counts_at_any_depth_follow_from_three(monkeypatch: pytest.MonkeyPatch, plan: Any) -> None:
    monkeypatch.setattr("grains_tl.finding.planning.DEPTHS", (CONFIG["num_hidden_layers"],))
    jobs = ["leave_one_out", "integrated_gradients", "margin_gradient", "caa", "sweep"]
    direct = plan_run(CONFIG, WORK, jobs=jobs, max_tokens=100).table.set_index("job")
    assert direct.equals(plan.loc[jobs])


@pytest.mark.parametrize(
    "kind", [{"model_type": "gpt2", "n_layer": 5}, {"model_type": "gemma3_text", "num_hidden_layers": 7}], ids=str
)
def test_other_architectures(kind: dict[str, Any]) -> None:
    plan = plan_run(kind, WORK, jobs=["caa", "gradient_x_input"])
    assert plan.n_layers in (5, 7) and (plan.table["tokens"] > 0).all()
    assert (plan.table["peak_gib"] > plan.weights_gib).all()


def test_pictures_run_through_the_tower() -> None:
    config = shape_config("qwen2.5-vl-7b").to_dict()
    without = plan_run(config, Workload(records=1, prompt_tokens=25), jobs=["caa"]).table.loc[0]
    with_one = plan_run(config, Workload(records=1, prompt_tokens=9, image_tokens=16), jobs=["caa"]).table.loc[0]
    # the same number of tokens: 16 patches between two markers; two rows with 64 rows of pixels each where none share
    assert with_one["pass_length"] == 9 + 18 + 8 and without["pass_length"] >= 25 + 8
    patches = 64 * with_one["tokens"] / with_one["pass_length"]
    tower = 0.67e9 * 2 * patches / 1e12
    language = with_one["tokens"] * without["teraflop"] / without["tokens"]
    assert with_one["teraflop"] == pytest.approx(language + tower, rel=0.1)


def allocated(job: Callable[[], Any]) -> float:
    """The most MiB that PyTorch's own allocator had given out at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        job()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(live) / 2**20


@pytest.mark.parametrize("job", ["leave_one_out", "gradient_x_input", "margin_gradient", "caa", "sweep"])
def test_planned_memory_is_what_is_allocated(job: str) -> None:
    """Within a fifth; of an allocator's own reserve and the workspaces of kernels a plan knows nothing."""
    config = {**CONFIG, "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 768}
    model = random_bridge(random_hugging_face(shape_config(config)))
    work = Workload(records=8, prompt_tokens=30)
    plan = plan_run(config, work, jobs=[job], dtype=torch.float32, max_tokens=1024)
    planned = 1024 * (plan.table["peak_gib"][0] - plan.weights_gib)
    with gr.settings(max_tokens=1024, progress=False):
        work.jobs(model, model.original_model.config)["caa"]()
        measured = allocated(work.jobs(model, model.original_model.config)[job])
    assert planned == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ("llama-9", {}, "llama-3.1-8b"),
        ({"hidden_size": 4}, {}, "model_type"),
        (CONFIG, {"jobs": ["leave_two_out"]}, "leave_two_out"),
        (CONFIG, {"workload": Workload(prompt_tokens=200)}, "128"),
        (CONFIG, {"workload": Workload(image_tokens=16)}, "qwen2_5_vl"),
        ("qwen2.5-vl-7b", {"workload": Workload(image_tokens=15), "jobs": ["caa"]}, "square"),
    ],
)
def test_what_cannot_be_planned(shape: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_run(shape, **options)


def test_sizes_are_whole_numbers() -> None:
    for wrong in ({"records": 0}, {"prompt_tokens": 2}, {"image_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Workload(**wrong)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    assert main(["plan", "--config", str(tmp_path), "--records", "2", "--prompt-tokens", "9", "--job", "caa"]) == 0
    said = capsys.readouterr().out
    assert "2 records, prompts of 9 tokens" in said and "caa" in said and "GiB" in said
    assert main(["plan", "--config", str(tmp_path / "none.json")]) == 2
