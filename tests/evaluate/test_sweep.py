"""Effects per record and sweeps: against a naive loop and a plain Hugging Face one; counted; killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.evaluate.measuring import run_settings
from grains_tl.evaluate.settings import Setting, grid
from grains_tl.evaluate.store import open_checkpoint
from grains_tl.evaluate.sweeps import counted_token_layers
from grains_tl.inference.choices import binary_accuracy, mc1, mc2, score_choices
from grains_tl.inference.logprobs import batch_logprobs, score_batches
from grains_tl.inference.restart import prepare_restart, restart_logprobs
from grains_tl.records.splits import record_id
from tests.conftest import tiny_hf, tiny_model
from tests.helpers.oracles import block, edited, n_blocks, pair_logprobs, response_logprobs, steered

ATOL = 1e-4  # nats; the promise of the sweep
ALPHAS = [-0.2, 0.0, 0.1, 0.4]
LAYERS = [0, 1, 2]
COLUMNS = ["vector", "positions", "layer", "alpha"]


def vectors_of(seed: int = 0, n_layers: int = 3) -> gr.SteeringVectors:
    """Random directions at the layers of the tiny model."""
    raw = torch.randn(n_layers, 32, generator=torch.Generator().manual_seed(seed))
    return gr.SteeringVectors.from_raw(raw, range(n_layers), torch.full((n_layers,), 6.0))


@pytest.fixture
def questions() -> list[gr.MultipleChoice]:
    """Answers of one token and of several; one question with two right answers."""
    return [
        gr.MultipleChoice(
            "question : was the food good ? answer :", (" yes", " no", " no it was bad"), (True, False, False)
        ),
        gr.MultipleChoice(
            "this film was",
            (" good", " awful", " very good and warm", " the soup was cold"),
            (True, False, True, False),
        ),
    ]


def by_hand(
    hf: Any, tokenized: list[gr.tokens.TokenizedPair], vectors: gr.SteeringVectors, alpha: float, layer: int
) -> list[float]:
    """Margins from a plain Hugging Face model with a plain forward hook, one response at a time."""
    step = alpha * vectors.resid_norms[layer] * vectors.directions[layer]
    with torch.no_grad(), edited(hf, layer, lambda act: steered(act, step, renorm=True)):
        return [float(a - b) for a, b in (pair_logprobs(hf, t) for t in tokenized)]


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 60, 4000])  # every record alone; a few settings in a pass; all in one
def test_restart_naive_and_hugging_face_agree(
    model: Any, hf: Any, pairs: list[gr.PreferencePair], max_tokens: int
) -> None:
    named = {"a": vectors_of(0), "b": vectors_of(1)}
    found, _ = gr.evaluate.sweep_records(model, named, pairs, alphas=ALPHAS, max_tokens=max_tokens, progress=False)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    base = [float(a - b) for a, b in (pair_logprobs(hf, t) for t in tokenized)]
    assert len(found) == 2 * len(LAYERS) * len(ALPHAS) * len(pairs)
    groups: Any = found.groupby(COLUMNS)
    for (name, _, layer, alpha), group in groups:
        wanted = by_hand(hf, tokenized, named[name], alpha, layer)
        naive = gr.score_pairs(model, tokenized, named[name].hooks(alpha, [int(layer)])).double()
        np.testing.assert_allclose(group["margin"], wanted, atol=ATOL, rtol=0)
        np.testing.assert_allclose(group["margin"], naive[:, 0] - naive[:, 1], atol=ATOL, rtol=0)
        np.testing.assert_allclose(group["base_margin"], base, atol=ATOL, rtol=0)
        np.testing.assert_allclose(group["change"], np.subtract(wanted, base), atol=2 * ATOL, rtol=0)
        assert alpha == 0 or group["change"].abs().max() > 0.01  # and steering did something


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_several_settings_in_one_pass(architecture: str, pairs: list[gr.PreferencePair]) -> None:
    """Copies of the batch side by side give what each gives alone, and it is one pass."""
    model, hf = tiny_model("bridge", architecture), tiny_hf(architecture)
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    vectors = vectors_of()
    (_, batch), *_ = score_batches(model, tokenized)
    restart = prepare_restart(model, batch, [1], copies=True)
    assert restart.tiles
    assert restart.packing is not None
    with counted_token_layers(model) as count, gr.settings(max_tokens=10_000):
        found = dict(run_settings(model, batch, grid({"v": vectors}, [1], [0.1, 0.2, 0.4])))
    assert count[-1] == 3 * restart.packing.row.numel()
    for i, alpha in enumerate([0.1, 0.2, 0.4]):
        wanted = by_hand(hf, gr.tokens.tokenize_pairs(model, pairs), vectors, alpha, 1)
        order = next(iter(score_batches(model, tokenized)))[0]
        got = (found[i][:, 0] - found[i][:, 1]).tolist()
        np.testing.assert_allclose(got, [wanted[j] for j in order], atol=ATOL, rtol=0)


def test_a_block_argument_that_cannot_be_copied(bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: Any) -> None:
    """Where copies of the batch would be wrong, settings run one at a time."""
    (_, batch), *_ = score_batches(bridge, gr.tokens.tokenize_pairs(bridge, pairs))
    monkeypatch.setattr("grains_tl.inference.restart._copied", lambda value, n_rows, copies: value)
    restart = prepare_restart(bridge, batch, [0], copies=True)
    assert restart.exact
    assert not restart.tiles
    settings = grid({"v": vectors_of()}, [0], [0.1, 0.4])
    with gr.settings(max_tokens=10_000):
        for i, logprobs in run_settings(bridge, batch, settings):
            hooks: Any = [] if i is None else settings[i].hooks
            torch.testing.assert_close(logprobs, batch_logprobs(bridge, batch, hooks), atol=ATOL, rtol=0)


LONG = ("the film was very good and the room was warm and", " we liked it . yes", " they hated this hotel")


@pytest.mark.parametrize("n_records", [1, 3])  # without and with padding, which blocks are told differently
def test_responses_share_their_prompt(bridge: Any, hf: Any, n_records: int) -> None:
    """Two long responses in one row: fewer tokens, the same numbers as apart; also in several copies and in scopes."""
    rows = [LONG, (LONG[0] + " one two", " yes we liked the soup", " no"), ("it was", " cold soup", " warm soup")][
        :n_records
    ]
    pairs = [gr.PreferencePair(*r) for r in rows]  # type: ignore[arg-type]
    tokenized, vectors = gr.tokens.tokenize_pairs(bridge, pairs), vectors_of()
    ((_, batch),) = score_batches(bridge, tokenized)
    restart = prepare_restart(bridge, batch, [0], copies=True)
    assert restart.packing is not None
    assert restart.tiles
    with counted_token_layers(bridge) as count, gr.settings(max_tokens=10_000):
        for _ in run_settings(bridge, batch, grid({"v": vectors}, [1], [0.1, 0.2])):
            pass
    assert count[-1] == 2 * restart.packing.row.numel() < 2 * 0.9 * batch.ids.numel()
    for positions in ("all", "prompt", "generated", "last"):
        found = gr.evaluate.record_effects(
            bridge, pairs, grid({"v": vectors}, [0, 1], [-0.4, 0.4], positions=positions)
        )  # type: ignore[arg-type]
        groups: Any = found.groupby(["layer", "alpha"])
        for (key, alpha), group in groups:
            layer = int(key)  # pandas 2 hands out NumPy's integers
            wanted = gr.score_pairs(
                bridge,
                tokenized,
                lambda b, a=alpha, i=layer, p=positions: vectors.hooks(a, [i], positions=p, prompt_len=b.prompt_len),  # type: ignore[misc]
            )
            np.testing.assert_allclose(group["margin"], wanted[:, 0] - wanted[:, 1], atol=ATOL, rtol=0)
            if positions == "all":
                np.testing.assert_allclose(
                    group["margin"], by_hand(hf, tokenized, vectors, alpha, layer), atol=ATOL, rtol=0
                )


def test_hooks_that_tell_rows_apart_are_not_packed(bridge: Any) -> None:
    """A hook may steer the prompt of one response only: then the prompt is not shared."""
    tokenized = gr.tokens.tokenize_pairs(bridge, [gr.PreferencePair(*LONG)])
    ((_, batch),) = score_batches(bridge, tokenized)
    restart = prepare_restart(bridge, batch, [0])
    assert restart.packing is not None
    mask = torch.zeros(2, batch.ids.shape[1], dtype=torch.bool)
    mask[0] = True
    hooks = vectors_of().hooks(0.4, [0], positions=mask)
    found = restart_logprobs(bridge, restart, 0, hooks)
    torch.testing.assert_close(found, batch_logprobs(bridge, batch, hooks), atol=ATOL, rtol=0)
    everywhere = batch_logprobs(bridge, batch, vectors_of().hooks(0.4, [0]))
    torch.testing.assert_close(found[0, 0], everywhere[0, 0], atol=ATOL, rtol=0)
    assert abs(found[0, 1] - everywhere[0, 1]) > 0.01


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_scopes(bridge: Any, hf: Any, pairs: list[gr.PreferencePair], positions: Any) -> None:
    """Each scope against a plain hook that knows where the prompt ends; several scopes in one call."""
    vectors, layer, alpha = vectors_of(), 1, 0.4
    found, _ = gr.evaluate.sweep_records(
        bridge, vectors, pairs, layers=[layer], alphas=[alpha], positions=["all", positions], progress=False
    )
    assert list(dict.fromkeys(found["positions"])) == ["all", positions]
    step = alpha * vectors.resid_norms[layer] * vectors.directions[layer]
    wanted = []
    for t in gr.tokens.tokenize_pairs(bridge, pairs):
        border = len(t.prompt)

        def edit(act: torch.Tensor, border: int = border) -> torch.Tensor:
            new = steered(act, step, renorm=True)
            first, last = {"prompt": (0, border), "generated": (border, None), "last": (border - 1, None)}[positions]
            out = act.clone()
            out[:, first:last] = new[:, first:last]
            return out

        with torch.no_grad(), edited(hf, layer, edit):
            chosen, rejected = pair_logprobs(hf, t)
        wanted.append(float(chosen - rejected))
    np.testing.assert_allclose(found.query("positions == @positions")["margin"], wanted, atol=ATOL, rtol=0)


def test_columns_of_a_pair_by_hand(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors, layer, alpha = vectors_of(), 2, -0.4
    found, _ = gr.evaluate.sweep_records(bridge, vectors, pairs, layers=[layer], alphas=[alpha], progress=False)
    step = alpha * vectors.resid_norms[layer] * vectors.directions[layer]
    rows: Any = found.itertuples()
    for row, t in zip(rows, gr.tokens.tokenize_pairs(bridge, pairs), strict=True):
        with torch.no_grad():
            base = torch.stack(pair_logprobs(hf, t))[:, 0].double()
            token_base = torch.stack(pair_logprobs(hf, t, "mean"))[:, 0].double()
            with edited(hf, layer, lambda act: steered(act, step, renorm=True)):
                new = torch.stack(pair_logprobs(hf, t))[:, 0].double()
                token_new = torch.stack(pair_logprobs(hf, t, "mean"))[:, 0].double()
        change = float(new[0] - new[1] - base[0] + base[1])
        assert row.margin_token == pytest.approx(float(token_new[0] - token_new[1]), abs=ATOL)
        wanted = float(token_new[0] - token_new[1] - token_base[0] + token_base[1])
        assert row.change_token == pytest.approx(wanted, abs=2 * ATOL)
        assert row.mc2 == pytest.approx(float(new.softmax(0)[0]), abs=ATOL)
        assert (row.correct, row.mc1, row.base_correct) == (new[0] > new[1], new[0] > new[1], base[0] > base[1])
        assert (row.win, row.wrong_way) == (change < 0, change > 0)  # alpha is negative


def test_questions_with_several_answers(bridge: Any, hf: Any, questions: list[gr.MultipleChoice]) -> None:
    """MC1 and MC2 against their definitions on log-likelihoods of the plain model, and against ``mc1`` and ``mc2``."""
    vectors, layer, alpha = vectors_of(), 1, 0.4
    settings = grid({"v": vectors}, [layer], [alpha])
    found = gr.evaluate.record_effects(bridge, questions, settings)
    step = alpha * vectors.resid_norms[layer] * vectors.directions[layer]
    rows: Any = found.itertuples()
    for row, item in zip(rows, questions, strict=True):
        prompt = bridge.tokenizer(item.prompt)["input_ids"]
        answers = [bridge.tokenizer(c)["input_ids"] for c in item.choices]
        with torch.no_grad(), edited(hf, layer, lambda act: steered(act, step, renorm=True)):
            p = torch.stack([response_logprobs(hf, prompt, a).sum() for a in answers]).double().exp()
        right = torch.tensor(item.labels)
        assert row.mc2 == pytest.approx(float(p[right].sum() / p.sum()), abs=ATOL)
        assert row.margin == pytest.approx(float((p[right].sum() / p[~right].sum()).log()), abs=ATOL)
        assert row.mc1 == bool(p[item.best] > p[~right].max())
        assert row.correct == bool(p[right].max() > p[~right].max())
    scores = score_choices(bridge, questions, vectors.hooks(alpha, [layer]))
    assert found["mc1"].tolist() == mc1(scores, questions).bool().tolist()
    np.testing.assert_allclose(found["mc2"], mc2(scores, questions), atol=ATOL)
    two = [gr.MultipleChoice(q.prompt, q.choices[:2], q.labels[:2]) for q in questions]
    binary = binary_accuracy(score_choices(bridge, two, vectors.hooks(alpha, [layer])), two)
    assert gr.evaluate.record_effects(bridge, two, settings)["correct"].tolist() == binary.bool().tolist()


def test_objectives(bridge: Any, hf: Any, pairs: list[gr.PreferencePair], questions: list[gr.MultipleChoice]) -> None:
    settings = grid({"v": vectors_of()}, [0], [0.2])
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    for objective in ("sum", "mean", "single"):
        found = gr.evaluate.record_effects(bridge, pairs, settings, objective=objective)  # type: ignore[arg-type]
        with torch.no_grad():
            wanted = [float(a - b) for a, b in (pair_logprobs(hf, t, objective) for t in tokenized)]
        np.testing.assert_allclose(found["base_margin"], wanted, atol=ATOL, rtol=0)
    with_sums, with_means = (
        gr.evaluate.record_effects(bridge, questions, settings, objective=o) for o in ("sum", "mean")
    )
    np.testing.assert_allclose(with_means["margin"], with_sums["margin_token"], atol=1e-12)
    with pytest.raises(ValueError, match="'single' is for preference pairs"):
        gr.evaluate.record_effects(bridge, questions, settings, objective="single")


def test_hooks_of_ones_own(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """A setting may carry any hooks, also above its layer; beside others, and named in the table."""
    vectors = vectors_of()
    own = [*vectors.hooks(0.2, [0]), *vectors.hooks(0.3, [2])]
    settings = [Setting(0, own, vector="two layers"), *grid({"v": vectors}, [0], [0.2, 0.4])]
    with gr.settings(max_tokens=10_000):
        found = gr.evaluate.record_effects(bridge, pairs, settings)
    assert found["vector"].tolist() == ["two layers"] * len(pairs) + ["v"] * 2 * len(pairs)
    for i, hooks in enumerate((own, vectors.hooks(0.2, [0]), vectors.hooks(0.4, [0]))):
        wanted = gr.score_pairs(bridge, gr.tokens.tokenize_pairs(bridge, pairs), hooks)
        got = found["margin"].to_numpy().reshape(3, -1)[i]
        np.testing.assert_allclose(got, wanted[:, 0] - wanted[:, 1], atol=ATOL, rtol=0)


def test_alpha_zero_is_exact_and_free(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    found, costs = gr.evaluate.sweep_records(
        bridge, vectors_of(), pairs, alphas=[0.0], neutral=["the film was good"], progress=False
    )
    assert costs is not None
    assert (found["change"] == 0).all()
    assert not found["win"].any()
    assert not found["wrong_way"].any()
    assert (costs["kl"] == 0).all()
    assert (costs["agreement"] == 1).all()
    with counted_token_layers(bridge) as count:
        gr.evaluate.record_effects(bridge, pairs, grid({"v": vectors_of()}, LAYERS, [0.0]))
    one_pass = 3 * sum(b.ids.numel() for _, b in score_batches(bridge, gr.tokens.tokenize_pairs(bridge, pairs)))
    assert sum(count) <= 2 * one_pass  # the run and its check


# -- what it takes ----------------------------------------------------------------------------------------------------


def test_half_the_token_layers_of_a_naive_loop(model: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """The naive number is what a plain loop really runs; ours is at least two times smaller."""
    ran: list[int] = []
    handles = [
        block(hf, i).register_forward_hook(lambda module, args, out: ran.append(args[0].shape[1]))
        for i in range(n_blocks(hf))
    ]
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    try:
        for _ in range(1 + len(LAYERS) * len(ALPHAS)):
            for t in tokenized:
                for response in (t.chosen, t.rejected):
                    with torch.no_grad():
                        hf(torch.tensor([[*t.prompt, *response[:-1]]]))
    finally:
        for handle in handles:
            handle.remove()
    frame = gr.sweep(model, vectors_of(), pairs, alphas=ALPHAS, progress=False)
    assert frame.attrs["naive_token_layers"] == sum(ran)
    assert 0 < frame.attrs["token_layers"] <= sum(ran) / 2


def test_the_sweep_table(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = vectors_of()
    frame = gr.sweep(bridge, vectors, pairs, layers=[1, 2], alphas=[-0.2, 0.2], progress=False)
    assert list(zip(frame["layer"], frame["alpha"], strict=True)) == [(1, -0.2), (1, 0.2), (2, -0.2), (2, 0.2)]
    assert {"margin", "effect", "effect_se", "wrong_way", "accuracy", "base_margin", "n"} <= set(frame)
    found, _ = gr.evaluate.sweep_records(bridge, vectors, pairs, layers=[1, 2], alphas=[-0.2, 0.2], progress=False)
    pd.testing.assert_frame_equal(frame, gr.evaluate.summarize(found))
    assert frame["effect"].tolist() == pytest.approx(found.groupby(["layer", "alpha"])["change"].mean().tolist())
    assert set(frame.attrs["records"]) == set(found["record_id"])


# -- killed and resumed -----------------------------------------------------------------------------------------------

JOB = """
import os, sys, time
sys.path[:0] = sys.argv[2:]
os.environ["TQDM_DISABLE"] = "1"
from tests.conftest import tiny_model
from tests.evaluate import test_sweep
import grains_tl as gr
from grains_tl.evaluate.store import Checkpoint
write = Checkpoint.append
def slow(self, rows):
    write(self, rows)
    time.sleep(0.02)
Checkpoint.append = slow
test_sweep.the_sweep(tiny_model(), sys.argv[1])
"""


def the_sweep(model: Any, checkpoint: Any, **changed: Any) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """60 settings on 12 records in several batches, and their cost."""
    words = "good bad cold warm awful great".split()
    records = [
        gr.PreferencePair(f"the {a} film was {b} and", f" {a}", f" {b} but cold") for a in words for b in words[:2]
    ]
    options: dict[str, Any] = {
        "alphas": [-0.2, -0.1, 0.1, 0.2, 0.4],
        "positions": ["all", "last"],
        "max_tokens": 40,
    } | changed
    texts = ["the film was good", "we hated it . it was very bad"]
    named = {"a": vectors_of(0), "b": vectors_of(1)}
    return gr.evaluate.sweep_records(
        model, named, [r for r in records if str(r.chosen).strip() not in r.rejected], neutral=texts, progress=False,
        checkpoint=checkpoint, **options,
    )  # fmt: skip


def keys_of(path: Path) -> list[str]:
    rows = []
    for line in path.read_text().splitlines()[1:]:
        try:
            rows.append(json.loads(line)["key"])
        except json.JSONDecodeError:
            continue
    return rows


def test_killed_and_resumed(bridge: Any, tmp_path: Path) -> None:
    """SIGKILL half-way: what is finished is kept, nothing is done twice, and the tables are those of a whole run."""
    whole, whole_costs = the_sweep(bridge, tmp_path / "whole.jsonl")
    n_rows = len(keys_of(tmp_path / "whole.jsonl"))
    path = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", JOB, str(path), str(Path(__file__).parents[2])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while (not path.exists() or len(keys_of(path)) < n_rows // 3) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()[-2000:] if process.stderr else ""
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    before = keys_of(path)
    assert n_rows // 3 <= len(before) < n_rows
    resumed, resumed_costs = the_sweep(bridge, path)
    after = keys_of(path)
    assert after[: len(before)] == before  # append-only
    assert len(after) == len(set(after)) == n_rows  # and no row twice
    assert resumed.attrs["from_checkpoint"] > 0
    pd.testing.assert_frame_equal(resumed, whole, atol=1e-5, rtol=0)  # copies in a pass may be grouped otherwise
    assert resumed_costs is not None
    assert whole_costs is not None
    pd.testing.assert_frame_equal(resumed_costs, whole_costs, atol=1e-5, rtol=0)
    with counted_token_layers(bridge) as count:  # all of it is there now: only the model's fingerprints are run
        again, _ = the_sweep(bridge, path)
    assert sum(count) == 3 * 6 * 3  # two vectors' checks and the file's, six tokens through three blocks each
    pd.testing.assert_frame_equal(again, resumed)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_torn_last_line(bridge: Any, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.jsonl"
    whole, _ = the_sweep(bridge, path, alphas=[0.2])
    n_rows = len(keys_of(path))
    path.write_text(path.read_text()[: -1 - cut])
    again, _ = the_sweep(bridge, path, alphas=[0.2])
    pd.testing.assert_frame_equal(again, whole, atol=1e-5, rtol=0)
    assert len(keys_of(path)) == len(set(keys_of(path))) == n_rows


def test_a_larger_grid_computes_what_is_new(bridge: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    the_sweep(bridge, path, alphas=[0.1, 0.2])
    before = keys_of(path)
    larger, _ = the_sweep(bridge, path, alphas=[0.1, 0.2, 0.4])
    n_base = path.read_text().count('"vector": "base"')
    added = len(keys_of(path)) - len(before)
    assert len(before) == n_base + 2 * added
    fresh, _ = the_sweep(bridge, None, alphas=[0.1, 0.2, 0.4])
    pd.testing.assert_frame_equal(larger, fresh, atol=1e-5, rtol=0)


def test_other_settings_are_not_mixed_up(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    options: dict[str, Any] = {"alphas": [0.2], "progress": False}
    gr.sweep(bridge, vectors_of(0), pairs, checkpoint=path, **options)
    for change in ({"vectors": vectors_of(1)}, {"operator": "add"}, {"objective": "mean"}, {"positions": "last"}):
        changed: dict[str, Any] = {"vectors": vectors_of(0), **options, **change}
        vectors = changed.pop("vectors")
        if "objective" in change:
            with pytest.warns(UserWarning, match="none of these records and settings"):
                found = gr.sweep(bridge, vectors, pairs, checkpoint=path, **changed)
        else:
            found = gr.sweep(bridge, vectors, pairs, checkpoint=path, **changed)
        wanted = gr.sweep(bridge, vectors, pairs, **changed)
        pd.testing.assert_frame_equal(found, wanted, atol=1e-6)


def test_the_same_record_twice(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    for max_tokens in (1, 4000):  # in batches of their own, and in one
        path = tmp_path / f"{max_tokens}.jsonl"
        for checkpoint in (None, path):
            frame, _ = gr.evaluate.sweep_records(
                bridge,
                vectors_of(),
                [pairs[0], pairs[1], pairs[0]],
                max_tokens=max_tokens,
                progress=False,
                checkpoint=checkpoint,
            )
            one, twin = (frame.query("record == @i")["change"].tolist() for i in (0, 2))
            assert one == twin
        assert len(keys_of(path)) == len(set(keys_of(path))) == 2 * (2 * len(LAYERS) + 1)


def test_the_image_is_part_of_a_record() -> None:
    """Two pictures under the same words are two records, one picture in two forms is one."""
    one, other = np.zeros((4, 4, 3), dtype=np.uint8), np.full((4, 4, 3), 9, dtype=np.uint8)
    ids = [record_id(gr.PreferencePair("this is", " a film", " a hotel", image=i)) for i in (None, one, [one], other)]
    assert ids[1] == ids[2]
    assert len(set(ids)) == 3


def test_files_that_are_no_checkpoint_are_refused(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    other = tmp_path / "records.jsonl"
    other.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="not a checkpoint of results"):
        gr.sweep(bridge, vectors_of(), pairs, checkpoint=other, progress=False)
    assert other.read_text() == '{"prompt": "a"}\n'
    path = tmp_path / "c.jsonl"
    gr.sweep(bridge, vectors_of(), pairs, checkpoint=path, alphas=[0.1], progress=False)
    tuned = tiny_model()
    tuned.original_model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="results of another model .*the weights"):
        gr.sweep(tuned, vectors_of(), pairs, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="settings with a key"):
        gr.evaluate.record_effects(bridge, pairs, [Setting(0, vectors_of().hooks(0.1, [0]))], checkpoint=path)


@pytest.mark.parametrize("cut", [1, 40])
def test_killed_in_the_first_line(bridge: Any, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.jsonl"
    open_checkpoint(path, bridge)
    whole = path.read_text()
    path.write_text(whole[: -1 - cut])
    assert open_checkpoint(path, bridge).rows == {}
    assert path.read_text() == whole


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(bridge: Any, pairs: list[gr.PreferencePair], questions: list[gr.MultipleChoice]) -> None:
    vectors = vectors_of()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": [7]}, "no vector for layer 7"),
        ({"alphas": []}, "nothing to measure"),
        ({"positions": "middle"}, "middle"),
        ({"operator": "multiply"}, "multiply"),
        ({"objective": "product"}, "product"),
        ({"neutral": 99}, "there are 1 to 30"),
        ({"neutral": []}, "no texts"),
        ({"neutral": ["the film was good", "film"]}, "text 2 has fewer than two tokens"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            gr.sweep(bridge, vectors, pairs, progress=False, **options)
    with pytest.raises(ValueError, match="cannot be mixed"):
        gr.sweep(bridge, vectors, [*pairs, *questions], progress=False)
    with pytest.raises(ValueError, match="no records"):
        gr.sweep(bridge, vectors, [], progress=False)
    broken = tiny_model()
    broken.original_model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives NaN on record"):
        gr.sweep(broken, vectors, pairs, progress=False)


def test_records_share_rows_without_padding(bridge: Any, hf: Any) -> None:
    """Prompts of very different lengths: no padding runs, and every number is that of a plain run of its own."""
    words = (
        "the film was very good and the room was warm and cold but we liked the soup . it was not bad " * 2
    ).split()
    pairs = [
        gr.PreferencePair(prompt=" ".join(words[:n]), chosen=" great . yes", rejected=" awful")
        for n in (4, 30, 9, 17, 6, 5)
    ]
    tokenized, vectors = gr.tokens.tokenize_pairs(bridge, pairs), vectors_of()
    with gr.settings(max_tokens=10_000), counted_token_layers(bridge) as count:
        found = gr.evaluate.record_effects(bridge, pairs, grid({"v": vectors}, [0], [0.3, -0.3]))
    length = sum(len(t.prompt) + len(t.chosen) - 1 for t in tokenized)
    widest = max(len(t.prompt) + len(t.chosen) - 1 for t in tokenized)
    packed = (
        (sum(count) - 3 * 6 * widest) / 2 / 4
    )  # without the plain run: two blocks, two copies to check and two to measure
    assert length <= packed < 1.1 * length < 6 * widest
    for t, change in zip(tokenized, found[found["alpha"] == 0.3]["margin"], strict=True):
        step = 0.3 * vectors.resid_norms[0] * vectors.directions[0]
        with torch.no_grad(), edited(hf, 0, lambda act, step=step: steered(act, step, renorm=True)):  # type: ignore[misc]
            a, b = pair_logprobs(hf, t)
        assert change == pytest.approx(float(a - b), abs=ATOL)
