"""From records to vectors in one call: agreement with the steps, checkpoints, and refusals before anything runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.attribution.gradient_methods import IntegratedGradients
from grains_tl.attribution.methods import METHODS
from grains_tl.vectors.grains import Grains
from grains_tl.vectors.manifest import manifest
from tests.conftest import KINDS, TL_MAJOR, tiny_model, tiny_tokenizer
from tests.helpers.attributing import attribute_records
from tests.helpers.oracles import embeddings, margin, residuals

RESID_RTOL = 1e-4  # relative to the largest entry: differences of float32 residuals of size 5 that are 0.1 and more
SCORE_ATOL = 1e-5
SAME_COSINE = 0.9999  # two implementations of one model, float32
OPTIONS: dict[str, Any] = {
    "method": "integrated_gradients",
    "n_steps": 3,
    "reference": "zero",
    "objective": "sum",
    "mask": "eos",
}


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Number of rows of every forward pass."""
    rows: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def not_running(model: Any) -> Iterator[None]:
    """Any forward pass is a mistake here."""
    with counting(model) as rows:
        yield
        assert not rows, "the model was run before the bad input was refused"


@contextmanager
def only_identified(model: Any) -> Iterator[None]:
    """The one short run of the model's fingerprint, and no other."""
    with counting(model) as rows:
        yield
        assert rows == [1]


# -- the whole job ----------------------------------------------------------------------------------------------------


def stand_in(hf: Any, masker: str) -> torch.Tensor:
    """What a masked token's embedding becomes, from the definition."""
    table = hf.get_input_embeddings().weight.detach()
    return {"eos": table[2], "mean_embedding": table.mean(0), "zero": torch.zeros_like(table[0])}[masker]


def read_by_hand(hf: Any, pair: gr.tokens.TokenizedPair, embeds: torch.Tensor, readout: str) -> torch.Tensor:
    """``[layer, d_model]`` residuals of one record read where ``readout`` says, responses run one by one."""
    if readout == "prompt_end":
        return residuals(hf, pair.prompt, embeds)[:, -1]
    ends = []
    for response in (pair.chosen, pair.rejected):
        whole = residuals(hf, pair.prompt, torch.cat([embeds, embeddings(hf, response)], dim=1))
        ends.append(whole[:, -1] if readout == "response_end" else whole[:, len(pair.prompt) :].mean(1))
    return (ends[0] + ends[1]) / 2


@pytest.mark.parametrize("readout", ["prompt_end", "response_end", "response_mean"])
@pytest.mark.parametrize("masker", ["eos", "mean_embedding", "zero"])
def test_vectors_by_hand(model: Any, hf: Any, pairs: list[gr.PreferencePair], masker: Any, readout: Any) -> None:
    """Leave-one-out, selection, masking, read-out and mean with nothing but the plain Hugging Face model."""
    top_k, replacement = 2, stand_in(hf, masker)
    wanted = torch.zeros(3, 32)
    for pair in gr.tokens.tokenize_pairs(model, pairs):
        content = torch.tensor(pair.content)
        variants = embeddings(hf, pair.prompt).detach().repeat(len(content), 1, 1)
        variants[range(len(content)), range(len(content))] = replacement
        scores = (margin(hf, pair) - margin(hf, pair, prompt_embeds=variants)).detach() * content
        order = scores.argsort(descending=True)
        up = [i for i in order[:top_k].tolist() if scores[i] > 0]
        down = [i for i in order[-top_k:].tolist() if scores[i] < 0]
        ends = []
        for positions in (up, down):
            masked = embeddings(hf, pair.prompt).detach().clone()
            masked[0, positions] = replacement
            ends.append(read_by_hand(hf, pair, masked, readout))
        wanted += (ends[1] - ends[0]) / len(pairs)  # d+ - d-: the unmasked run cancels
    found = gr.build_vectors(
        model, pairs, top_k=top_k, method="leave_one_out", mask=masker, readout=readout, progress=False
    )
    assert found.layers == (0, 1, 2)
    torch.testing.assert_close(found.raw, wanted, atol=RESID_RTOL * float(wanted.abs().max()), rtol=0)


def test_the_end_can_be_spared(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Masking the position that is read replaces the residual that is read."""
    ends = [t.n_content for t in gr.tokens.tokenize_pairs(bridge, pairs)]
    assert [bool(t.content[-1]) for t in gr.tokens.tokenize_pairs(bridge, pairs)] == [True] * 4
    for pair, n in zip(pairs, ends, strict=True):
        a = gr.attribute(bridge, pair)
        plain, spared = gr.attribution.select_tokens(a, n), gr.attribution.select_tokens(a, n, spare_end=True)
        last = len(a.tokens) - 1
        assert last in plain.toward_chosen + plain.toward_rejected
        assert [i for i in plain.toward_chosen if i != last] == list(spared.toward_chosen)
        assert [i for i in plain.toward_rejected if i != last] == list(spared.toward_rejected)
    one, two = (gr.build_vectors(bridge, pairs, top_k=3, spare_end=s, progress=False) for s in (False, True))
    assert one.info["spare_end"] is False and two.info["spare_end"] is True
    assert not torch.allclose(one.raw, two.raw)
    tokenized = gr.tokens.tokenize_pairs(bridge, pairs)
    last_masked: list[bool] = []

    def note(model: Any, rows: Any, masked: Any, **options: Any) -> Any:
        last_masked.extend(len(t.prompt) - 1 in m for t, m in zip(rows, masked, strict=True))
        return torch.zeros(len(rows), 1, 32)

    selections = [gr.attribution.select_tokens(gr.attribute(bridge, p), 3) for p in pairs]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "grains_tl.baselines.controls.read_out",
            lambda m, rows, masked=None, **o: note(m, rows, masked or [()] * len(rows)),
        )
        for spare in (True, False):
            last_masked.clear()
            gr.baselines.random_token_differences(
                bridge, tokenized, selections, layers=[1], resid_norms=torch.ones(1), n_draws=5, spare_end=spare
            )
            assert any(last_masked) == (not spare)
    with pytest.raises(ValueError, match="spare_end and group_by"):
        gr.build_vectors(bridge, pairs, top_k=1, spare_end=True, group_by="word", progress=False)


def test_knocked_out_tokens_do_not_matter(model: Any, pairs: list[gr.PreferencePair]) -> None:
    """With attention knock-out the masked token's own content cannot reach the read-out position."""
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    changed = [replace(t, prompt=(t.prompt[0], 9, *t.prompt[2:])) for t in tokenized]
    at: dict[str, Any] = {"layers": [0, 1, 2], "mask": "attention"}
    one, two = (gr.vectors.read_out(model, some, [[1]] * len(some), **at) for some in (tokenized, changed))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    seen = gr.vectors.read_out(model, changed, [[0]] * len(changed), **at)
    assert not torch.allclose(seen, gr.vectors.read_out(model, tokenized, [[0]] * len(tokenized), **at), atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduce", ["mean", "svd", "pca"])
def test_every_method_and_reduction(model: Any, pairs: list[gr.PreferencePair], method: Any, reduce: Any) -> None:
    found = gr.build_vectors(
        model, pairs, top_k=2, method=method, reduce=reduce, n_steps=2, layers=[2, 0], progress=False
    )
    assert found.layers == (0, 2) and found.directions.shape == (2, 32)
    torch.testing.assert_close(found.directions.norm(dim=-1), torch.ones(2))
    assert torch.isfinite(found.raw).all() and (found.resid_norms > 0).all()
    tokenized = gr.tokens.tokenize_pairs(model, pairs)
    steered = gr.score_pairs(model, tokenized, found.hooks(0.5, [0]))
    assert not torch.allclose(steered, gr.score_pairs(model, tokenized), atol=1e-2)


def test_layers_are_taken_from_the_same_run(model: Any, pairs: list[gr.PreferencePair]) -> None:
    everything = gr.build_vectors(model, pairs, top_k=2, progress=False)
    one = gr.build_vectors(model, pairs, top_k=2, layers=[1], progress=False)
    torch.testing.assert_close(one.directions, everything.at([1]).directions, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.resid_norms, everything.at([1]).resid_norms, atol=1e-5, rtol=0)


def test_twice_is_the_same(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    one, two = (gr.build_vectors(bridge, iter(pairs), top_k=2, progress=False) for _ in range(2))
    assert torch.equal(one.directions, two.directions) and dict(one.info) == dict(two.info)


def test_global_random_state_is_untouched(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    before = torch.random.get_rng_state()
    gr.build_vectors(bridge, pairs, top_k=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(TL_MAJOR >= 4, reason="HookedTransformer was removed in TL 4")
@pytest.mark.parametrize("method", METHODS)
def test_both_classes_give_the_same_vectors(pairs: list[gr.PreferencePair], method: Any) -> None:
    one, two = (
        gr.build_vectors(tiny_model(kind), pairs, top_k=2, method=method, n_steps=8, progress=False)
        for kind in ("bridge", "hooked")
    )
    assert one.cosine(two).min() > SAME_COSINE
    torch.testing.assert_close(one.magnitudes, two.magnitudes, rtol=1e-3, atol=0)
    torch.testing.assert_close(one.resid_norms, two.resid_norms, rtol=1e-3, atol=0)


def test_manifest(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    def info(records: list[gr.PreferencePair] = pairs, **options: Any) -> dict[str, Any]:
        return dict(gr.build_vectors(bridge, records, top_k=2, progress=False, n_steps=2, **options).info)

    plain, ig = info(), info(method="integrated_gradients")
    assert plain["top_k"] == 2 and plain["n_records"] == 4 and plain["median_relative_gap"] is None
    assert ig["method"] == "integrated_gradients" and ig["median_relative_gap"] > 0 and 0 <= ig["converged_share"] <= 1
    assert info(pairs[:3])["data_hash"] != plain["data_hash"] == ig["data_hash"]
    assert plain["moved_borders"] == 0
    merged = [replace(t, moved_border=i) for i, t in enumerate(gr.tokens.tokenize_pairs(bridge, pairs))]
    assert manifest(bridge, merged, {})["moved_borders"] == 3  # of the four only the first border stayed
    assert plain["seed"] is None  # nothing random happens in a build
    other = tiny_model("bridge")
    other.tokenizer.chat_template = "{{ messages[0].content }}"
    changed = dict(gr.build_vectors(other, pairs, top_k=2, progress=False).info)
    assert changed["template_hash"] != plain["template_hash"]
    assert changed["model"]["config_hash"] == plain["model"]["config_hash"]
    assert plain["model"]["name"] == "tiny" and plain["model"]["d_model"] == 32
    assert (
        plain["versions"]["torch"] == torch.__version__.split("+")[0] or plain["versions"]["torch"] in torch.__version__
    )
    assert json.loads(json.dumps(plain)) == plain  # it goes into a file's header


# -- checkpoints ------------------------------------------------------------------------------------------------------


def same(found: list[gr.Attribution], wanted: list[gr.Attribution]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.scores.isnan(), b.scores.isnan())
        torch.testing.assert_close(a.scores.nan_to_num(), b.scores.nan_to_num(), atol=SCORE_ATOL, rtol=1e-4)
        assert a.tokens == b.tokens and torch.equal(a.content, b.content) and a.method == b.method
        assert a.gap == pytest.approx(b.gap, abs=1e-4) and a.objective == pytest.approx(b.objective, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_saves_the_attribution(
    model: Any, pairs: list[gr.PreferencePair], tmp_path: Path, method: str
) -> None:
    tokenized, options = gr.tokens.tokenize_pairs(model, pairs), {**OPTIONS, "method": method}
    if not hasattr(METHODS[method], "reference"):
        del options["reference"]
    path = tmp_path / "new" / "checkpoint.jsonl"
    first = attribute_records(model, tokenized, options, checkpoint=path)
    with only_identified(model):
        again = attribute_records(model, tokenized, options, checkpoint=path)
    same(again, first)
    same(first, attribute_records(model, tokenized, options))
    with only_identified(model):  # any order, any part
        same(attribute_records(model, tokenized[:0:-1], options, checkpoint=path), first[:0:-1])


def test_build_resumes(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.jsonl"
    plain = gr.build_vectors(bridge, pairs, top_k=2, progress=False)
    with counting(bridge) as rows:
        gr.build_vectors(bridge, pairs, top_k=2, progress=False, checkpoint=path)
        n_first = sum(rows)
        rows.clear()
        resumed = gr.build_vectors(bridge, pairs, top_k=2, progress=False, checkpoint=path)
    # three reading runs a record at the most and two fingerprints, no attribution
    assert sum(rows) <= 3 * len(pairs) + 2 < n_first
    torch.testing.assert_close(resumed.directions, plain.directions, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change",
    [{"method": "sequential_ig"}, {"n_steps": 4}, {"reference": "eos"}, {"objective": "mean"}, {"mask": "zero"}],
)
def test_other_settings_do_not_use_the_checkpoint(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, change: dict[str, Any]
) -> None:
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    with counting(bridge) as rows:
        attribute_records(bridge, tokenized, {**OPTIONS, **change}, checkpoint=path)
    assert rows
    with only_identified(bridge):  # both are in the file now
        attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)


def test_other_records_and_models_do_not_use_the_checkpoint(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path
) -> None:
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    attribute_records(bridge, tokenized[:2], OPTIONS, checkpoint=path)
    with counting(bridge) as rows:
        attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    assert sum(rows) > 0
    other = tiny_model()
    other.original_model.get_input_embeddings().weight.mul_(1.1)
    with counting(other) as rows:
        attribute_records(other, tokenized, OPTIONS, checkpoint=path)
    assert sum(rows) > 0


def test_a_model_with_other_blocks_does_not_use_the_checkpoint(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path
) -> None:
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    tuned = tiny_model()
    tuned.original_model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with counting(tuned) as rows:
        attribute_records(tuned, tokenized, OPTIONS, checkpoint=path)
    assert sum(rows) > 1


@pytest.mark.parametrize("n_done", [0, 1, 3])
def test_interruption_keeps_what_is_done(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, n_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a record: the ones before it are in the file."""
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    wanted = attribute_records(bridge, tokenized, OPTIONS)
    true, calls = IntegratedGradients.scores, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > n_done:
            raise KeyboardInterrupt
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(IntegratedGradients, "scores", interrupted)
        with pytest.raises(KeyboardInterrupt), gr.settings(max_tokens=1):
            attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    assert len(path.read_text().splitlines()) == n_done
    same(attribute_records(bridge, tokenized, OPTIONS, checkpoint=path), wanted)
    assert len(path.read_text().splitlines()) == len(pairs)  # and none was done twice


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_torn_last_line(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path, cut: int) -> None:
    """A run killed while writing: the torn record is done again, the others are kept, the file stays readable."""
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    wanted = attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    whole = path.read_text()
    path.write_text(whole[: -1 - cut])
    with counting(bridge) as rows:
        same(attribute_records(bridge, tokenized, OPTIONS, checkpoint=path), wanted)
    assert rows
    with only_identified(bridge):
        same(attribute_records(bridge, tokenized, OPTIONS, checkpoint=path), wanted)


@pytest.mark.parametrize(
    "content",
    [
        '{"other": 1}\n[1, 2]\n3\n\nnot json\n',
        '{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "a,b\n1,2\n",
        "\x00\x01",
    ],
    ids=["json", "records, no line end", "csv", "binary"],
)
def test_a_file_of_another_program_is_refused_and_left_alone(
    content: str, bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path
) -> None:
    """Such as the records themselves, named by mistake: rows were once written to the end of them."""
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a checkpoint of attributions"):
        attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    assert path.read_text() == content


def test_lines_of_another_program_between_rows_are_skipped(
    bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path
) -> None:
    tokenized, path = gr.tokens.tokenize_pairs(bridge, pairs), tmp_path / "c.jsonl"
    wanted = attribute_records(bridge, tokenized, OPTIONS, checkpoint=path)
    path.write_text('{"other": 1}\n[1, 2]\n3\n\nnot json\n' + path.read_text())
    with only_identified(bridge):
        same(attribute_records(bridge, tokenized, OPTIONS, checkpoint=path), wanted)


def test_the_same_record_twice(bridge: Any, pairs: list[gr.PreferencePair], tmp_path: Path) -> None:
    tokenized = gr.tokens.tokenize_pairs(bridge, [pairs[0], pairs[1], pairs[0]])
    found = attribute_records(bridge, tokenized, OPTIONS, checkpoint=tmp_path / "c.jsonl")
    same(found, attribute_records(bridge, tokenized, OPTIONS))


# -- bad input --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"prompt": "this film was very", "chosen": " good", "rejected": " bad"}
CHAT = [{"role": "user", "content": "was it good"}]
BAD_RECORDS: list[tuple[list[dict[str, Any]], str]] = [
    ([], "no records"),
    ([GOOD, {**GOOD, "prompt": "good " * 70}], "record 2: .*context holds 64"),
    ([GOOD, {**GOOD, "prompt": "film"}], "record 2: top_k=2 is more than the 1 content tokens"),
    ([GOOD, {**GOOD, "rejected": "  good"}], "record 2: chosen and rejected give the same tokens"),
]
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": 5}, "record 1: top_k=5 is more than the 4 content tokens"),
    ({"method": "shapley"}, "shapley"),
    ({"reduce": "median"}, "median"),
    ({"side": "left"}, "left"),
    ({"layers": [3]}, "layers 0 to 2"),
    ({"layers": [-1]}, "layers 0 to 2"),
    ({"layers": []}, "no layers"),
    ({"objective": "product"}, "product"),
    ({"n_steps": 0}, "n_steps=0"),
    ({"reference": "ones", "method": "integrated_gradients"}, "ones"),
    ({"reference": "mask", "method": "integrated_gradients"}, "mask token"),
    ({"mask": "noise"}, "noise"),
    ({"mask": "mask"}, "mask token"),
    ({"readout": "middle"}, "middle"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("records", "message"), BAD_RECORDS)
def test_bad_records_are_refused_before_anything_runs(model: Any, records: Any, message: str) -> None:
    with not_running(model), pytest.raises(ValueError, match=message):
        gr.build_vectors(model, [gr.PreferencePair(**r) for r in records], top_k=2, progress=False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_runs(model: Any, options: dict[str, Any], message: str) -> None:
    with not_running(model), pytest.raises(ValueError, match=message):
        gr.build_vectors(model, [gr.PreferencePair(**GOOD)] * 2, **{"top_k": 2, "progress": False, **options})


def test_pca_of_one_record_is_refused_before_anything_runs(model: Any) -> None:
    with not_running(model), pytest.raises(ValueError, match="needs at least 2 records"):
        gr.build_vectors(model, [gr.PreferencePair(**GOOD)], top_k=2, reduce="pca", progress=False)


def test_responses_without_a_differing_token_are_refused_before_anything_runs(model: Any) -> None:
    late = gr.PreferencePair("we liked this film and the very good food", " good", " good and warm")
    with not_running(model), pytest.raises(ValueError, match="record 2: .*single"):
        gr.build_vectors(model, [gr.PreferencePair(**GOOD), late], top_k=2, objective="single", progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_conversation_without_a_template_is_refused_before_anything_runs(kind: str) -> None:
    model = tiny_model(kind, tokenizer=tiny_tokenizer(chat=False))
    with not_running(model), pytest.raises(ValueError, match="no chat template"):
        gr.build_vectors(model, [gr.PreferencePair(CHAT, "good", "bad")], top_k=1, progress=False)


def test_model_without_tokenizer_is_refused_before_anything_runs() -> None:
    model = tiny_model()
    model.tokenizer = None
    with not_running(model), pytest.raises(ValueError, match="no tokenizer"):
        gr.build_vectors(model, [gr.PreferencePair(**GOOD)], top_k=1, progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_weights_are_noticed(kind: str, pairs: list[gr.PreferencePair], method: Any) -> None:
    model = tiny_model(kind)
    next(p for name, p in model.named_parameters() if "mlp" in name).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gr.build_vectors(model, pairs, top_k=2, method=method, n_steps=2, progress=False)


@pytest.mark.parametrize(("at_the_end", "warned"), [(4, True), (2, False), (0, False)])
def test_masking_the_token_that_is_read_is_said(
    at_the_end: int, warned: bool, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gr.attribution.attribute_all(tiny_model("bridge"), pairs[:4])
    for i, one in enumerate(found):
        one.scores[:] = 0.1
        one.scores[-1 if i < at_the_end else -2] = 3.0
    monkeypatch.setattr(Grains, "attribute", lambda self, records: found)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gr.build_vectors(tiny_model("bridge"), pairs[:4])
    about = [w for w in seen if "prompt's last token" in str(w.message)]
    assert len(about) == warned and all("4 of 4 records" in str(w.message) for w in about)
    assert all(w.filename == __file__ for w in about)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.build_vectors(tiny_model("bridge"), pairs[:4], spare_end=True)
        gr.build_vectors(tiny_model("bridge"), pairs[:4], readout="response_mean")
