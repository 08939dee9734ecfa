"""What somebody met who used the package for the first time: wrong numbers without a word, or false words."""

from __future__ import annotations

import json
import warnings
from typing import Any, cast

import pandas as pd
import pytest
import torch

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.hooks.steer import steer_hook
from grains_tl.models.identity import model_identity, same_fingerprint, without_hooks
from tests.conftest import tiny_hf, tiny_tokenizer

UNIT = torch.tensor([1.0, 0.0])


def steered(n_rows: int, n_pos: int, **options: Any) -> torch.Tensor:
    """Where a hook changes zeros."""
    act = torch.zeros(n_rows, n_pos, 2)
    return steer_hook(0, UNIT, 1.0, operator="add", **options)[0][1](act, hook=None)[..., 0] != 0


def hooked_from_config(tokenizer: Any, **options: Any) -> Any:
    """A HookedTransformer as users make their own, with random weights (TransformerLens 3)."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": 8, "n_ctx": 32, "d_head": 4, "d_vocab": len(tokenizer), "act_fn": "relu"}
    tokenizer.init_kwargs |= {"name_or_path": "tiny", "add_bos_token": True}
    return HookedTransformer(HookedTransformerConfig(**shape, **options), tokenizer=tokenizer).eval()


# -- the text interface of a loaded model and the package's own ids ---------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_texts_become_the_same_ids_everywhere(kind: Any, adds_bos: bool, tmp_path: Any) -> None:
    if kind == "hooked":
        pytest.importorskip("transformer_lens.HookedTransformer")
    from tests.tokens.test_tokens import bos_tokenizer

    tiny_hf().save_pretrained(tmp_path)
    (bos_tokenizer() if adds_bos else tiny_tokenizer()).save_pretrained(tmp_path)
    model = gr.load_model(str(tmp_path), kind=kind)
    pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("the film was", " good", " bad")])[0]
    assert model.to_tokens("the film was")[0].tolist() == list(pair.prompt)
    assert (gr.tokens.token_rules(model).bos is not None) == adds_bos == bool(model.cfg.default_prepend_bos)


def test_a_bos_that_was_switched_off_stays_off(tmp_path: Any) -> None:
    from tests.tokens.test_tokens import bos_tokenizer

    for wanted in (False, True):
        model = hooked_from_config(bos_tokenizer(), default_prepend_bos=wanted)
        pair = gr.tokens.tokenize_pairs(model, [gr.PreferencePair("the film was", " good", " bad")])[0]
        assert model.to_tokens("the film was")[0].tolist() == list(pair.prompt)


# -- which model vectors belong to ------------------------------------------------------------------------------------


def test_hooks_of_the_user_do_not_make_it_another_model(model: Any, pairs: list[gr.PreferencePair]) -> None:
    calls = []

    def own(act: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append(1)
        return act + 1.0

    vectors = gr.build_vectors(model, pairs, top_k=1)
    ids = torch.tensor([[3, 4, 5]])
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", own), ("blocks.1.hook_resid_post", own)]):
        before = model(ids)
        vectors.require_match(model)
        frame = gr.sweep(model, vectors, pairs, layers=[1], alphas=[0.2], progress=False)
        built = gr.build_vectors(model, pairs, top_k=1)
        with without_hooks(model):
            n, bare = len(calls), model(ids)
            assert len(calls) == n
        assert torch.equal(model(ids), before)  # they are back
        with pytest.raises(RuntimeError, match="inside"), without_hooks(model):
            raise RuntimeError("inside")
        assert torch.equal(model(ids), before)
        assert model_identity(model) != model_identity(model, bare=True)  # rows of a checkpoint are of what was run
    assert torch.equal(model(ids), bare)
    assert not torch.equal(bare, before)
    built.require_match(model)
    assert (built.raw - vectors.raw).abs().max() > 1e-3  # the hooks did act on the build
    plain = gr.sweep(model, vectors, pairs, layers=[1], alphas=[0.2], progress=False)
    assert (frame["base_margin"] - plain["base_margin"]).abs().max() > 1e-4


def test_bfloat16_is_the_same_model_and_other_weights_are_not() -> None:
    """Measured on SmolLM2: float32, bfloat16, and float32 of other weights of that size."""
    norms = [3.2, 3.1, 2.9, 3.0, 3.3, 2.8]
    full = {"logprobs": [-11.36, -13.83, -14.87, -11.63, -5.96, -18.62], "norms": norms}
    half = {"logprobs": [-11.15, -13.83, -14.46, -11.65, -5.9, -18.52], "norms": norms}
    other = {"logprobs": [-11.36, -13.83, -14.87, -11.63, -6.96, -18.62], "norms": norms}
    assert same_fingerprint(full, half)
    assert same_fingerprint(half, full)
    assert not same_fingerprint(full, other)


# -- steering ---------------------------------------------------------------------------------------------------------


def test_prompt_len_must_fit_the_run() -> None:
    assert steered(2, 4, positions="prompt", prompt_len=torch.tensor([1, 3])).sum(1).tolist() == [1, 3]
    with pytest.raises(ValueError, match="prompt_len has 4 rows, the run has 1"):
        steered(1, 4, positions="prompt", prompt_len=torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="prompt_len=9 is beyond the 4 positions"):
        steered(1, 4, positions="generated", prompt_len=9)
    assert steered(1, 1, positions="generated", prompt_len=9).all()  # a decoding step
    for bad in (0, -2, torch.tensor([0, 2])):
        with pytest.raises(ValueError, match="prompt_len="):
            steered(2, 4, positions="prompt", prompt_len=bad)


def test_one_layer_is_steered_once() -> None:
    vectors = gr.SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
    with pytest.raises(ValueError, match=r"layers \[5, 5\] steer one layer twice"):
        vectors.hooks(0.2, [5, 5])


# -- tables -----------------------------------------------------------------------------------------------------------


def test_joined_tables_know_their_operators(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    cells: list[tuple[int, Any]] = [(0, "add_renorm"), (1, "add")]
    frames = [
        gr.sweep(bridge, vectors, pairs, layers=[layer], alphas=[0.2], operator=operator, progress=False)
        for layer, operator in cells
    ]
    joined = pd.concat(frames)
    for best, frame in enumerate(frames):
        joined["effect"] = [1.0 + (best == i) for i in (0, 1)]
        choice = gr.choose(joined, records=pairs)
        assert (choice.layer, choice.operator) == (best, frame["operator"].iloc[0])
    with pytest.raises(ValueError, match="objectives"):
        gr.choose(joined.assign(objective=["sum", "mean"]), records=pairs)


def test_true_is_no_number_of_texts(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    with pytest.raises(ValueError, match="whole number"):
        gr.sweep(bridge, vectors, pairs, neutral=True, progress=False)


def test_controls_by_default(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    draws = gr.baselines.baseline_draws(bridge, pairs, layers=[1], n_draws=1)
    assert set(draws) == {"random_direction", "shuffled_labels", "random_tokens"}
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    assert "orthogonal_direction" in gr.baselines.baseline_draws(bridge, pairs, layers=[1], n_draws=1, like=vectors)


# -- what is printed --------------------------------------------------------------------------------------------------


def test_vectors_say_what_they_are(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    assert repr(vectors).startswith(f"SteeringVectors(layers {list(vectors.layers)}, d_model")
    assert f"{len(pairs)} records" in repr(vectors)
    assert len(repr([vectors] * 20)) < 4000
    assert vectors in [vectors]
    assert vectors != gr.build_vectors(bridge, pairs, top_k=1)  # objects; .cosine compares them


def test_printed_scores_are_those_that_can_be_chosen() -> None:
    scores, content = torch.tensor([9.0, 0.5, -1.0]), torch.tensor([False, True, True])
    a = gr.Attribution(
        scores, ["<bos>", " good", " bad"], content, torch.zeros(3, dtype=torch.bool), None, 1.5, None, "m"
    )
    assert str(a).endswith("largest: ' bad' -1.00, ' good' +0.50")


# -- records with images ----------------------------------------------------------------------------------------------


def test_images_are_found_under_both_names() -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b"}
    assert gr.load_pairs([{**row, "images": ["a.png", "b.png"], "note": 1}])[0].image == ["a.png", "b.png"]
    assert gr.load_pairs([{**row, "images": ["a.png"], "note": 1}])[0].meta == {"note": 1}
    assert gr.load_pairs([{**row, "images": []}])[0].image is None
    assert gr.load_pairs([{**row, "img": "c.png"}], {"image": "img"})[0].image == "c.png"
    with pytest.raises(KeyError, match="no column 'img' for 'image'"):
        gr.load_pairs([row], {"image": "img"})


def test_a_lost_image_is_noticed() -> None:
    vlm = gr.load_model("tiny-vlm")
    pair = gr.PreferencePair("<image> question : is there a 3 ? answer :", " yes", " no")
    question = gr.MultipleChoice(pair.prompt, (" yes", " no"), (True, False))
    for call in (
        lambda: gr.attribute(vlm, pair),
        lambda: gr.tokens.tokenize_pairs(vlm, [pair]),
        lambda: gr.inference.score_choices(vlm, [question]),
        lambda: gr.generate(vlm, [pair.prompt], max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match="placeholder for an image, but no image was given"):
            call()


# -- models without a final norm --------------------------------------------------------------------------------------


def test_a_model_without_norms(pairs: list[gr.PreferencePair]) -> None:
    model = hooked_from_config(tiny_tokenizer(), normalization_type=None, default_prepend_bos=False)
    tokenized = gr.tokens.tokenize_pairs(model, pairs[:1])[0]
    logprobs = [
        model(torch.tensor([[*tokenized.prompt, *response]]))[0, len(tokenized.prompt) - 1 : -1]
        .log_softmax(-1)[range(len(response)), list(response)]
        .sum()
        for response in (tokenized.chosen, tokenized.rejected)
    ]
    assert gr.attribute(model, pairs[0]).objective == pytest.approx((logprobs[0] - logprobs[1]).item(), abs=1e-4)
    vectors = gr.build_vectors(model, pairs, top_k=1)
    assert len(gr.sweep(model, vectors, pairs, progress=False)) == 4
    assert len(gr.analysis.logit_lens(model, vectors)) > 0


# -- questions in letters ---------------------------------------------------------------------------------------------


def test_digits_are_no_letters(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(model: Any, items: Any, *_: Any, **__: Any) -> pd.DataFrame:
        asked.extend(items)
        return pd.DataFrame()

    monkeypatch.setattr("grains_tl.evaluate.quality.record_effects", note)
    right = (True, False)
    gr.evaluate.retention(bridge, [gr.MultipleChoice("2 + 2?", (" 4", " 5"), right)], [])
    gr.evaluate.retention(bridge, [gr.MultipleChoice("A. 4\nB. 5\n", (" A", " B"), right)], [])
    assert [item.choices for item in asked] == [(" A", " B")] * 2
    assert "A. 4" in asked[0].prompt
    assert asked[1].prompt == "A. 4\nB. 5\n"


# -- the shell --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Any, bridge: Any, pairs: list[gr.PreferencePair]) -> Any:
    tiny_hf().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    vectors = gr.build_vectors(gr.load_model(str(tmp_path / "model")), pairs, top_k=1)
    for layer in (0, 1):
        vectors.at([layer]).save(tmp_path / f"v{layer}.safetensors")
    return tmp_path


def shell(folder: Any, command: str, *arguments: str) -> int:
    paths = [a.replace("@", f"{folder}/") for a in arguments]
    return main([command, *paths, "--model", str(folder / "model")])


def test_a_device_that_is_not_there(folder: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what is asked for")
    monkeypatch.setattr("grains_tl.models.loading._load_hugging_face", lambda *_: pytest.fail("the weights were read"))
    assert shell(folder, "attribute", "--pairs", "@pairs.jsonl", "--device", "cuda") == 2
    assert "device='cuda' cannot be used here" in capsys.readouterr().err


def test_a_sweep_of_vectors_with_different_layers(folder: Any, bridge: Any) -> None:
    files = ["--vectors", "@v0.safetensors", "--vectors", "@v1.safetensors", "--pairs", "@pairs.jsonl"]
    options = ["--neutral", "0", "--report-share", "0", "--alphas=-0.2,0.2", "--out", "@t.csv"]
    assert shell(folder, "sweep", *files, *options) == 0
    table = pd.read_csv(folder / "t.csv")
    assert sorted(zip(table["vector"], table["layer"], strict=True)) == [("v0", 0)] * 2 + [("v1", 1)] * 2
    assert set(table["operator"]) == {"add_renorm"}


def test_a_table_stays_where_no_cell_is_cheap_enough(folder: Any, capsys: Any) -> None:
    options = ["--neutral", "2", "--max-kl", "1e-9", "--report-share", "0", "--alphas", "0.2", "--out", "@t.csv"]
    assert shell(folder, "sweep", "--vectors", "@v0.safetensors", "--pairs", "@pairs.jsonl", *options) == 2
    assert "no cell costs 1e-09 nats per token or less" in capsys.readouterr().err
    assert (folder / "t.csv").exists()


def test_an_interrupt_says_what_is_kept(folder: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("grains_tl.models.loading.load_model", interrupt)
    assert shell(folder, "attribute", "--pairs", "@pairs.jsonl") == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    (folder / "new.safetensors.partial.jsonl").write_text("")
    assert shell(folder, "build", "--pairs", "@pairs.jsonl", "--out", "@new.safetensors") == 130
    assert "new.safetensors.partial.jsonl, and the same command goes on" in capsys.readouterr().err


# -- words, paths, BOS ------------------------------------------------------------------------------------------------


def test_glued_responses_are_noticed() -> None:
    row = {"prompt": "The film was", "chosen": "great", "rejected": " bad"}
    with pytest.warns(UserWarning, match=r"1 of 2 responses .* \(record 1 reads \.\.\.'wasgreat'\)"):
        gr.load_pairs([row])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.load_pairs([{**row, "chosen": " great"}, {**row, "prompt": "这部电影", "chosen": "很好"}])
        gr.load_pairs([{**row, "prompt": "It was (", "chosen": "great)"}])


@pytest.mark.usefixtures("unchecked")
def test_a_path_or_a_picture_where_a_list_is_wanted(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.build_vectors(bridge, pairs, top_k=1)
    with pytest.raises(ValueError, match=r"read them first: gr.load_pairs\('p.jsonl'\)"):
        gr.sweep(bridge, vectors, cast(Any, "p.jsonl"))
    with pytest.raises(ValueError, match=r"images=\[image\]"):
        gr.generate(bridge, ["the film"], images=cast(Any, "a.png"))
    plain = gr.generate(bridge, ["the film"], max_new_tokens=2)
    assert gr.generate(bridge, ["the film"], images=cast(Any, iter([None])), max_new_tokens=2) == plain


def test_another_bos_rule_is_said(tmp_path: Any, pairs: list[gr.PreferencePair]) -> None:
    from tests.tokens.test_tokens import bos_tokenizer

    models = []
    for name, tokenizer in (("without", tiny_tokenizer()), ("with", bos_tokenizer())):
        tiny_hf().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        models.append(gr.load_model(str(tmp_path / name)))
    vectors = gr.build_vectors(models[0], pairs, top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors.require_match(models[0])
    with pytest.warns(UserWarning, match="built with no BOS added, this model's tokenizer gives BOS id"):
        vectors.require_match(models[1])


def test_the_heading_says_what_was_done(folder: Any, capsys: Any) -> None:
    options = ["--prompt", "the film was", "--max-new-tokens", "2"]
    for extra, said in (
        ([], "steered: alpha +0.3, layer 0"),
        (["--operator", "ablate", "--positions", "generated"], "steered: alpha +0.3, layer 0, ablate, generated"),
    ):
        assert shell(folder, "steer", "--vectors", "@v0.safetensors", *options, *extra) == 0
        assert capsys.readouterr().out.splitlines()[1].partition(" | ")[2].strip() == said
