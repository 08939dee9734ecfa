"""Unusual but sound input gives what the plain spelling gives; the rest is refused early, from Python and from a shell."""

# mypy: disable-error-code="arg-type, list-item, func-returns-value"
# values of the wrong type are what this file is about
from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.attribution import store
from grains_tl.cli import main as cli
from tests.conftest import tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")  # as a user meets it: without the run-time type checks
GOOD = {"prompt": "this film was very", "chosen": " good", "rejected": " bad"}
ROWS = [GOOD, {"prompt": "the food was not", "chosen": " great", "rejected": " awful"}]
IDS = torch.tensor([[3, 5, 8, 9]])


def build(model: Any, **options: Any) -> gr.SteeringVectors:
    return gr.build_vectors(model, gr.load_pairs(ROWS), **{"top_k": 1, "progress": False, **options})


# -- other spellings of the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: pd.DataFrame(ROWS),
        lambda folder: pd.DataFrame(ROWS, index=["b", "a"]),
        lambda folder: (row for row in ROWS),
        lambda folder: tuple(ROWS),
        lambda folder: written(folder / "p.jsonl"),
        lambda folder: str(written(folder / "p.jsonl")),
    ],
    ids=["table", "table with an index", "generator", "tuple", "Path", "path as text"],
)
def test_records_from_anywhere(source: Any, tmp_path: Path) -> None:
    assert gr.load_pairs(source(tmp_path)) == [gr.PreferencePair(**row) for row in ROWS]


def written(path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "layers",
    [np.array([0, 2]), torch.tensor([2, 0]), [np.int64(0), np.int32(2)], (i for i in (0, 2)), range(0, 3, 2)],
    ids=["array", "tensor", "numpy numbers", "generator", "range"],
)
def test_layers_in_any_spelling(layers: Any, bridge: Any) -> None:
    found = build(bridge, layers=layers)
    assert found.layers == (0, 2) and torch.equal(found.raw, build(bridge, layers=[0, 2]).raw)


@pytest.mark.parametrize("alpha", [np.float64(0.3), torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.3])])
@pytest.mark.parametrize("layers", [np.array([1]), [np.int64(1)], range(1, 2)], ids=["array", "numpy number", "range"])
def test_hooks_from_any_number(alpha: Any, layers: Any, bridge: Any) -> None:
    vectors = build(bridge)
    with torch.no_grad():
        wanted = bridge.run_with_hooks(IDS, fwd_hooks=vectors.hooks(float(alpha), [1]))
        assert torch.equal(bridge.run_with_hooks(IDS, fwd_hooks=vectors.hooks(alpha, layers)), wanted)


def test_sweep_over_arrays(bridge: Any) -> None:
    vectors, pairs = build(bridge), gr.load_pairs(ROWS)
    wanted = gr.sweep(bridge, vectors, pairs, layers=[0, 1], alphas=[-0.25, 0.25], progress=False)
    for kind in (np.array, torch.tensor):
        found = gr.sweep(bridge, vectors, pairs, layers=kind([0, 1]), alphas=kind([-0.25, 0.25]), progress=False)
        pd.testing.assert_frame_equal(found, wanted)


def test_what_was_built_with_numpy_numbers_can_be_kept(bridge: Any, tmp_path: Path) -> None:
    """It was lost at the very end: JSON holds no numpy numbers and no tensors."""
    baseline = torch.linspace(-1, 1, 32)
    options = {"method": "integrated_gradients", "reference": baseline}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # eight steps are few; not what is asked here
        made = build(
            bridge,
            top_k=np.int64(1),
            n_steps=np.int64(8),
            max_tokens=np.int64(512),
            checkpoint=tmp_path / "c.jsonl",
            **options,
        )
    found = gr.load_vectors(made.save(tmp_path / "v.safetensors"), bridge)
    assert torch.equal(found.raw, made.raw) and found.info["top_k"] == 1 and found.info["n_steps"] == 8
    assert found.info["baseline"] == baseline.tolist()


def test_arrays_paths_and_sets_in_the_manifest_can_be_written(tmp_path: Path) -> None:
    info = {"where": tmp_path, "scores": np.arange(2.0), "share": np.float32(0.5), "sets": {"a"}}
    made = gr.SteeringVectors.from_raw(torch.ones(2, 4), np.array([0, 1]), torch.ones(2), info)
    found = gr.load_vectors(made.save(tmp_path / "v.safetensors")).info
    assert found == {"where": str(tmp_path), "scores": [0.0, 1.0], "share": 0.5, "sets": ["a"]}


@pytest.mark.parametrize(
    "prompts", [pd.Series(["the film was", "a"]), np.array(["the film was", "a"]), iter(["the film was", "a"])]
)
def test_prompts_from_anywhere(prompts: Any, bridge: Any) -> None:
    assert gr.generate(bridge, prompts, max_new_tokens=np.int64(3)) == gr.generate(
        bridge, ["the film was", "a"], max_new_tokens=3
    )


# -- refused -----------------------------------------------------------------------------------------------------------

VECTORS = gr.SteeringVectors.from_raw(torch.ones(3, 32), range(3), torch.ones(3))
REFUSED: dict[str, tuple[Any, str]] = {
    "ids instead of records, build": (lambda m: gr.build_vectors(m, [3, 4]), "record 1 .*int"),
    "an id, attribute": (lambda m: gr.attribute(m, 3), "record 1 .*int"),
    "one record": (lambda m: gr.build_vectors(m, gr.PreferencePair(**GOOD)), r"a PreferencePair; .*\[pair\] for one"),
    "a path": (lambda m: gr.build_vectors(m, "p.jsonl"), "a str; expected a list of PreferencePair"),
    "an id among records, sweep": (lambda m: sweep(m, pairs=[*gr.load_pairs(ROWS), 3]), "record 3 .*int"),
    "one record, sweep": (lambda m: sweep(m, pairs=gr.PreferencePair(**GOOD)), "expected a list of PreferencePair"),
    "vectors as a path, sweep": (lambda m: sweep(m, "v.safetensors"), "vectors are a str; .*load_vectors"),
    "top_k 1.5": (lambda m: build(m, top_k=1.5), "top_k=1.5; expected a whole number"),
    "n_steps 2.5": (lambda m: build(m, n_steps=2.5), "n_steps=2.5; expected a whole number"),
    "max_tokens 0": (lambda m: build(m, max_tokens=0), "max_tokens=0; expected at least 1"),
    "layers as a number": (lambda m: build(m, layers=1), r"layers=1; expected a list: layers=\[1\]"),
    "layers as text": (lambda m: build(m, layers="1"), "layers='1'; expected a list"),
    "a layer between two": (lambda m: build(m, layers=[1.5]), "layer=1.5; expected a whole number"),
    "a layer called True": (lambda m: build(m, layers=[True]), "layer=True; expected a whole number"),
    "noise NaN": (
        lambda m: build(m, method="smoothgrad", noise=math.nan),
        "noise=nan; expected a finite number",
    ),
    "no layer to steer": (lambda m: VECTORS.hooks(0.2, []), "no layers given, so nothing would be steered"),
    "alpha as text": (lambda m: VECTORS.hooks("0.3", [1]), "alpha='0.3'; expected one number"),
    "several alphas": (lambda m: VECTORS.hooks(np.array([0.1, 0.2]), [1]), "expected one number"),
    "temperature NaN": (lambda m: gr.generate(m, ["a"], temperature=math.nan), "temperature=nan; expected a finite"),
    "new tokens 2.5": (lambda m: gr.generate(m, ["a"], max_new_tokens=2.5), "max_new_tokens=2.5; expected a whole"),
    "no text": (
        lambda m: gr.generate(m, [None]),
        "prompt 1: the prompt is None, a NoneType; text or a list of messages",
    ),
    "token ids": (lambda m: gr.generate(m, [[3, 4]]), "prompt 1: the prompt has 3 in it; a list of messages"),
    "neutral text of one token": (lambda m: sweep(m, neutral=["the film was", "film"]), "text 2 has fewer than two"),
    "neutral text that is empty": (lambda m: sweep(m, neutral=[""]), "text 1: the prompt is empty"),
    "neutral text too long": (lambda m: sweep(m, neutral=["a " * 80]), "text 1: .* the model's context holds 64"),
    "one neutral text": (lambda m: sweep(m, neutral="the film was"), "texts='the film was'; expected a list"),
    "limit -1": (lambda m: gr.load_pairs(ROWS, limit=-1), "limit=-1; expected at least 1"),
    "None as records": (lambda m: gr.load_pairs(None), "records are a NoneType"),
    "columns as a list": (lambda m: gr.load_pairs(ROWS, ["prompt"]), "a mapping such as"),
}


def sweep(model: Any, vectors: Any = VECTORS, pairs: Any = None, **options: Any) -> pd.DataFrame:
    records = gr.load_pairs(ROWS) if pairs is None else pairs
    return gr.sweep(model, vectors, records, layers=[1], progress=False, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_records_run(name: str, bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint of the weights is one short run; the records themselves never reach the model."""
    ran: list[Any] = []
    long_work = {
        "attribution.store": "attribute_all",
        "evaluate.sweeps": "record_effects",
        "inference.generation": "_continue",
    }
    for room, function in long_work.items():
        if "among records" not in name:
            module = importlib.import_module(f"grains_tl.{room}")
            monkeypatch.setattr(module, function, lambda *args, **kwargs: ran.append(args))
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(bridge)
    assert not ran


# -- the shell ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, records and vectors."""
    path = tmp_path_factory.mktemp("shell")
    tiny_hf().save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    written(path / "p.jsonl")
    shell("build", f"--pairs={path}/p.jsonl", f"--model={path}/model", "--top-k=1", f"--out={path}/v.safetensors")
    return path


def shell(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shell_loads_the_type_that_was_asked_for(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dtype was read and forgotten."""
    made: list[Any] = []
    load = gr.load_model
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *a, **k: made.append(load(*a, **k)) or made[-1])
    name = str(dtype).removeprefix("torch.")
    common = (f"--pairs={folder}/p.jsonl", f"--model={folder}/model", f"--dtype={name}")
    assert shell("attribute", *common) == 0
    assert "record 2: leave_one_out: f(x) =" in capsys.readouterr().out
    assert {p.dtype for p in made[0].original_model.parameters()} == {dtype}


@pytest.mark.parametrize("asked", [True, False])
def test_the_shell_runs_under_autocast_when_asked(
    asked: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[bool] = []
    run = store.attribute_records

    def noting(*args: Any, **kwargs: Any) -> Any:
        found.append(torch.is_autocast_enabled("cpu"))
        return run(*args, **kwargs)

    monkeypatch.setattr("grains_tl.attribution.store.attribute_records", noting)
    common = (f"--pairs={folder}/p.jsonl", f"--model={folder}/model")
    assert shell("attribute", *common, *(["--autocast"] if asked else [])) == 0
    assert found == [asked] and not torch.is_autocast_enabled("cpu")


SHELL: dict[str, tuple[list[str], str]] = {
    "alpha NaN": (
        ["steer", "--vectors={f}/v.safetensors", "--prompt=a", "--alpha=nan"],
        "not one finite number",
    ),
    "layer not stored": (["steer", "--vectors={f}/v.safetensors", "--prompt=a", "--layer=7"], "no vector for layer 7"),
    "layers backwards": (["steer", "--vectors={f}/v.safetensors", "--prompt=a", "--layer=2-0"], "the lower one first"),
    "no new tokens": (
        ["steer", "--vectors={f}/v.safetensors", "--prompt=a", "--max-new-tokens=0"],
        "whole number of at least 1",
    ),
    "no vectors": (["steer", "--vectors={f}/none.safetensors", "--prompt=a"], "no file"),
    "top-k 0": (["build", "--pairs={f}/p.jsonl", "--out={f}/o.safetensors", "--top-k=0"], "whole number of at least 1"),
    "a folder to write": (["build", "--pairs={f}/p.jsonl", "--out={f}"], "is a folder; name a file in it"),
    "limit -1": (["attribute", "--pairs={f}/p.jsonl", "--limit=-1"], "whole number of at least 1"),
    "threads -1": (["attribute", "--pairs={f}/p.jsonl", "--threads=-1"], "whole number of at least 1"),
    "no records": (["attribute", "--pairs={f}/none.jsonl"], "no file"),
    "alphas NaN, sweep": (
        ["sweep", "--vectors={f}/v.safetensors", "--pairs={f}/p.jsonl", "--alphas=nan"],
        "finite numbers",
    ),
    "records for choosing and report": (
        ["sweep", "--vectors={f}/v.safetensors", "--pairs={f}/p.jsonl", "--test={f}/p.jsonl"],
        "also in --pairs",
    ),
    "layers not stored, sweep": (
        ["sweep", "--vectors={f}/v.safetensors", "--pairs={f}/p.jsonl", "--layers=7"],
        "v does not contain the layers [7]",
    ),
    "an unknown method": (["compare-attributions", "--methods=foo"], "method='foo' is not known"),
    "an empty prompt": (["steer", "--vectors={f}/v.safetensors", "--prompt= "], "--prompt is empty"),
    "a folder as table": (["sweep", "--vectors={f}/v.safetensors", "--pairs={f}/p.jsonl", "--out={f}"], "is a folder"),
}


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_refuses_before_the_model_is_loaded(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grains_tl.models.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    arguments, words = SHELL[name]
    try:
        status = shell(*(a.format(f=folder) for a in arguments))
    except SystemExit as left:  # refused by the reader of the command line
        status = int(left.code or 0)
    assert status == 2 and words in capsys.readouterr().err


# -- hooks, scopes and vectors that are not what they should be --------------------------------------------------------


@pytest.mark.parametrize(
    "hooks",
    [
        lambda v: v,
        lambda v: v.hooks(0.2, [0])[0],
        lambda v: dict(v.hooks(0.2, [0])),
        lambda v: [name for name, _ in v.hooks(0.2, [0])],
    ],
    ids=["vectors", "one hook", "mapping", "names"],
)
def test_hooks_that_are_none(bridge: Any, hooks: Any) -> None:
    wrong = hooks(build(bridge, layers=[0]))
    with pytest.raises(ValueError, match=r"hooks"):
        gr.generate(bridge, ["this film was"], wrong, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"hooks"):
        gr.score_pairs(bridge, gr.tokens.tokenize_pairs(bridge, gr.load_pairs(ROWS)), wrong)


@pytest.mark.parametrize("positions", [[0, 1], 3, torch.tensor([True, False]), torch.ones(1, 4, dtype=torch.long)])
def test_scopes_that_are_none(bridge: Any, positions: Any) -> None:
    with pytest.raises(ValueError, match="positions="):
        build(bridge, layers=[0]).hooks(0.2, positions=positions)


def test_vectors_that_do_not_fit_together(bridge: Any) -> None:
    vectors = build(bridge, layers=[0, 1])
    for wrong in (
        lambda: vectors + 1.0,  # type: ignore[operator]
        lambda: vectors.at([]),
        lambda: gr.SteeringVectors.from_raw(torch.ones(4), [0], torch.ones(1)),
        lambda: gr.SteeringVectors.from_raw(torch.ones(2, 4), [0], torch.ones(1)),
        lambda: gr.SteeringVectors.from_raw(torch.ones(1, 4), [0], torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"vectors|layers="):
            wrong()
    ours = gr.SteeringVectors.from_raw(np.ones((1, 4)), [0], np.ones(1))
    assert torch.equal(ours.raw, torch.ones(1, 4))


def test_a_step_that_breaks_the_model_is_said(bridge: Any) -> None:
    vectors = build(bridge, layers=[0])
    with pytest.warns(UserWarning, match="1 of 2 settings give NaN"):
        gr.sweep(bridge, vectors, gr.load_pairs(ROWS), alphas=[0.2, 1e38], operator="add", progress=False)


def test_prompts_that_conversations_imply() -> None:
    """TRL's implicit prompts: chosen and rejected are whole conversations with the same beginning."""
    asked = [{"role": "user", "content": "was the film good ?"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    (pair,) = gr.load_pairs([{"chosen": [*asked, *yes], "rejected": [*asked, *no]}])
    assert pair == gr.PreferencePair(prompt=asked, chosen=yes, rejected=no)
    with pytest.raises(KeyError, match="prompt"):
        gr.load_pairs([{"chosen": yes, "rejected": no}])
