"""Baselines and controls against scikit-learn, peft on a plain Hugging Face model, and loops with plain PyTorch hooks."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import grains_tl as gr
from grains_tl.baselines import heads as heads_room
from grains_tl.baselines.controls import random_token_differences, shuffle_labels
from grains_tl.inference.objectives import margins
from grains_tl.vectors import building as records_room
from tests.conftest import TL_MAJOR, tiny_hf, tiny_model
from tests.helpers.oracles import block, margin, pair_logprobs, residuals
from tests.helpers.vision_families import FAMILIES, build, picture
from tests.helpers.vision_families import bridge as vision_bridge

ATOL = 2e-5  # float32 sums in another order over three layers
COS = 1 - 1e-5
TRAINED_ATOL = 1e-3  # nats; AdamW's first steps divide a gradient by its own size, which amplifies rounding
LAYERS = [0, 2]


@pytest.fixture
def toks(model: Any, pairs: list[gr.PreferencePair]) -> list[gr.tokens.TokenizedPair]:
    return gr.tokens.tokenize_pairs(model, pairs)


def response_ends(hf: Any, toks: Sequence[gr.tokens.TokenizedPair], layers: Sequence[int]) -> Tensor:
    """``[record, 2, layer, d_model]`` from one plain run per sequence."""
    rows = [[residuals(hf, t.prompt + r)[list(layers), -1] for r in (t.chosen, t.rejected)] for t in toks]
    return torch.stack([torch.stack(both) for both in rows])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


# -- vectors on the residual stream -----------------------------------------------------------------------------------


def test_caa_and_icv(model: Any, hf: Any, pairs: list[gr.PreferencePair], toks: list[gr.tokens.TokenizedPair]) -> None:
    found = gr.baselines.baseline_vectors(model, pairs, ["caa", "icv"], layers=LAYERS)
    ends = response_ends(hf, toks, LAYERS)
    difference = (ends[:, 0] - ends[:, 1]).double()
    assert cosine(found["caa"].directions, difference.mean(0)).min() > COS
    assert torch.allclose(found["caa"].magnitudes.double(), difference.mean(0).norm(dim=-1), rtol=1e-4)
    # with every difference and its negative, centring takes nothing away
    flat = difference.flatten(1).numpy()
    axis = PCA(1).fit(np.concatenate([flat, -flat])).components_[0]
    axis = axis * np.sign(axis @ flat.mean(0))
    assert cosine(found["icv"].directions, torch.from_numpy(axis).view(2, -1)).min() > COS
    assert cosine(found["icv"].directions, found["caa"].directions).max() < 0.999  # another recipe


def test_prompt_mean(model: Any, hf: Any, pairs: list[gr.PreferencePair], toks: list[gr.tokens.TokenizedPair]) -> None:
    found = gr.baselines.baseline_vectors(model, pairs, ["prompt_mean"], layers=LAYERS)["prompt_mean"]
    base = [float(margin(hf, t)) for t in toks]
    order = sorted(range(4), key=lambda i: base[i])
    ends = torch.stack([residuals(hf, t.prompt)[LAYERS, -1] for t in toks])
    wanted = ends[order[2:]].mean(0) - ends[order[:2]].mean(0)
    assert torch.allclose(found.raw, wanted, atol=10 * ATOL)


def test_prompt_mean_needs_two_kinds_of_records(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="none of the 1 lies above"):
        gr.baselines.baseline_vectors(bridge, pairs[:1], ["prompt_mean"], layers=[1])


def test_one_unit_for_all(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """Every baseline is of unit length, in units of the same median residual norm."""
    like = gr.build_vectors(bridge, pairs, top_k=2, layers=LAYERS, progress=False)
    found = gr.baselines.baseline_vectors(bridge, pairs, list(gr.baselines.BASELINES), layers=LAYERS, like=like)
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    norms = torch.cat([residuals(hf, t.prompt)[:, list(t.content)].norm(dim=-1) for t in toks], dim=1)
    assert list(found) == list(gr.baselines.BASELINES)
    for vectors in found.values():
        assert vectors.layers == (0, 2)
        assert torch.allclose(vectors.directions.norm(dim=-1), torch.ones(2))
        assert torch.allclose(vectors.resid_norms, norms.median(dim=1).values[LAYERS], rtol=1e-4)
        vectors.require_match(bridge)


def test_orthogonal_directions(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    like = gr.baselines.baseline_vectors(bridge, pairs, ["caa"], layers=LAYERS)["caa"]
    own = gr.baselines.orthogonal_direction_vectors(like, n_draws=3, seed=1)
    named = gr.baselines.baseline_draws(
        bridge, pairs, ["orthogonal_direction"], layers=LAYERS, n_draws=3, seed=1, like=like
    )
    for a, b in zip(own, named["orthogonal_direction"], strict=True):
        assert a.cosine(like).abs().max() < 1e-6
        assert torch.allclose(a.directions, b.directions)
    assert own[0].cosine(own[1]).abs().max() < 0.9


def test_orthogonal_directions_are_uniform() -> None:
    """The mean of v v' over draws is (I - u u') / (d - 1)."""
    u = torch.tensor([[0.6, 0.8, 0.0, 0.0]])
    like = gr.SteeringVectors(u, (0,), torch.ones(1), torch.ones(1))
    v = torch.cat([d.directions for d in gr.baselines.orthogonal_direction_vectors(like, n_draws=4000)])
    assert torch.allclose(v.T @ v / len(v), (torch.eye(4) - u.T @ u) / 3, atol=0.03)


def test_shuffled_labels_are_the_method_on_swapped_records(model: Any, pairs: list[gr.PreferencePair]) -> None:
    """Swapping in the differences is swapping in the records and running everything again."""

    def differences(records: list[gr.PreferencePair]) -> gr.vectors.Differences:
        toks = gr.tokens.tokenize_pairs(model, records)
        selections = [
            gr.attribution.select_tokens(a, 2) for a in gr.attribution.attribute_all(model, toks, progress=False)
        ]
        return gr.vectors.collect_differences(model, toks, selections, layers=LAYERS)

    before = differences(pairs)
    shuffled = shuffle_labels(before, torch.Generator().manual_seed(3))
    swapped = [not torch.equal(a, b) for a, b in zip(before.toward_chosen, shuffled.toward_chosen, strict=True)]
    assert sum(swapped) == 2
    records = [
        gr.PreferencePair(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen) if s else p
        for p, s in zip(pairs, swapped, strict=True)
    ]
    after = differences(records)
    assert torch.allclose(after.toward_chosen, shuffled.toward_chosen, atol=ATOL)
    assert torch.allclose(after.toward_rejected, shuffled.toward_rejected, atol=ATOL)


@pytest.mark.parametrize("n", [6, 7])
def test_shuffled_labels_have_expectation_zero(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(n, 1, 5, generator=generator) + 3
    given = gr.vectors.Differences(up, torch.zeros_like(up), (4,), torch.ones(1))
    draws = [shuffle_labels(given, generator) for _ in range(2000)]
    means = torch.stack([(d.toward_chosen - d.toward_rejected).mean(0)[0] for d in draws])
    standard_error = means.std(0) / len(means) ** 0.5
    assert (means.mean(0).abs() < 4 * standard_error).all()
    for d in draws[:20]:  # a half is swapped, and nothing is lost
        assert int((d.toward_rejected != 0).any(-1).sum()) in (n // 2, (n + 1) // 2)
        assert torch.equal(d.toward_chosen + d.toward_rejected, up)


def test_shuffled_labels_of_given_differences(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    norms = torch.ones(2)
    caa = gr.baselines.caa_differences(bridge, toks, layers=LAYERS, resid_norms=norms)
    own = gr.baselines.shuffled_label_vectors(caa, n_draws=3, seed=2)
    for options in ({"differences": caa}, {}):  # CAA's are the default
        found = gr.baselines.baseline_draws(
            bridge, pairs, ["shuffled_labels"], layers=LAYERS, n_draws=3, seed=2, **options
        )  # fmt: skip
        for a, b in zip(own, found["shuffled_labels"], strict=True):
            assert cosine(a.directions, b.directions).min() > COS


def test_random_tokens(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    pairs = [pairs[0], *pairs[2:]]  # long enough for two tokens on each side
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    like = [gr.attribution.Selection((0, 1), (2, 3))] * len(toks)
    wanted = random_token_differences(bridge, toks, like, layers=[1], resid_norms=torch.ones(1), n_draws=2, seed=5)
    found = gr.baselines.baseline_draws(bridge, pairs, ["random_tokens"], layers=[1], n_draws=2, seed=5, top_k=2)[
        "random_tokens"
    ]
    for d, v in zip(wanted, found, strict=True):
        assert torch.allclose(v.raw, (d.toward_chosen - d.toward_rejected).mean(0), atol=ATOL)
    assert cosine(found[0].directions, found[1].directions).max() < 0.999


def test_what_draws_share_is_run_once(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = records_room.read_out_responses

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(records_room, "read_out_responses", counted)
    gr.baselines.baseline_draws(bridge, pairs, ["caa", "icv", "shuffled_labels"], layers=[1], n_draws=10)
    assert len(calls) == 1


def test_draws_depend_on_the_seed_alone(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    state = torch.get_rng_state()
    alone = gr.baselines.baseline_draws(bridge, pairs, ["shuffled_labels"], layers=[1], n_draws=2, seed=4)[
        "shuffled_labels"
    ]
    beside = gr.baselines.baseline_draws(
        bridge, pairs, ["random_direction", "shuffled_labels"], layers=[1], n_draws=2, seed=4
    )
    other = gr.baselines.baseline_draws(bridge, pairs, ["shuffled_labels"], layers=[1], n_draws=2, seed=5)[
        "shuffled_labels"
    ]
    assert all(
        torch.equal(a.directions, b.directions) for a, b in zip(alone, beside["shuffled_labels"], strict=True)
    )  # fmt: skip
    assert any(not torch.equal(a.directions, b.directions) for a, b in zip(alone, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_baseline_of_ones_own(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    def first_record(records: Any, generator: Any) -> Tensor:
        return records.response_differences[0]

    found = gr.baselines.baseline_vectors(bridge, pairs, ["caa", first_record], layers=[1])
    alone = gr.baselines.baseline_vectors(bridge, pairs[:1], ["caa"], layers=[1])["caa"]
    assert found["first_record"].cosine(alone) > COS


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["cca"], {}, "no baselines called"),
        ("caa", {}, "a list of baselines"),
        ([], {}, "a list of baselines"),
        (["caa"], {"layers": [3]}, "do not exist"),
        (["orthogonal_direction"], {}, "pass like=vectors"),
        (["random_tokens"], {"n_draws": 0}, "at least one draw"),
    ],
)
def test_refused_baselines(
    bridge: Any, pairs: list[gr.PreferencePair], names: Any, options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        gr.baselines.baseline_draws(bridge, pairs, names, **{"layers": [1], **options})


def test_differences_must_fit(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    d = gr.vectors.Differences(torch.ones(3, 1, 32), torch.zeros(3, 1, 32), (1,), torch.ones(1))
    with pytest.raises(ValueError, match="3 records at layers .1. do not fit 4 records"):
        gr.baselines.baseline_draws(bridge, pairs, ["shuffled_labels"], layers=[1], differences=d)


# -- attention heads --------------------------------------------------------------------------------------------------


def output_projection(hf: Any, layer: int) -> Any:
    module: Any = block(hf, layer)
    return module.self_attn.o_proj if hasattr(module, "self_attn") else module.attn.c_proj


def head_outputs(hf: Any, ids: Sequence[int], layers: Sequence[int], n_heads: int) -> Tensor:
    """``[layer, head, d_head]`` at the last token: the input of the output projection, from one plain run."""
    found: list[Tensor] = []
    handles = [
        output_projection(hf, layer).register_forward_pre_hook(lambda module, args: found.append(args[0][0, -1]))
        for layer in layers
    ]
    with torch.no_grad():
        hf(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return torch.stack([z.view(n_heads, -1) for z in found])


@contextmanager
def shifted(hf: Any, layer: int, shift: Tensor) -> Iterator[None]:
    """A plain PyTorch hook that moves the head outputs (concatenated) of a layer at every position."""
    handle = output_projection(hf, layer).register_forward_pre_hook(lambda module, args: (args[0] + shift,))
    try:
        yield
    finally:
        handle.remove()


ARCHITECTURES = [
    ("bridge", "llama"),
    ("bridge", "gpt2"),
    pytest.param("hooked", "llama", marks=pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")),
]


@pytest.mark.parametrize(("kind", "architecture"), ARCHITECTURES)
def test_heads_are_read_and_moved_as_in_hugging_face(
    kind: str, architecture: str, pairs: list[gr.PreferencePair]
) -> None:
    """Grouped-query attention (llama: 2 key-value heads, 4 heads) and GPT-2's transposed projection."""
    model, hf = tiny_model(kind, architecture), tiny_hf(architecture)
    toks = gr.tokens.tokenize_pairs(model, pairs)
    with gr.settings(max_tokens=40):
        found = heads_room.read_out_heads(model, toks, layers=LAYERS)
    wanted = torch.stack(
        [torch.stack([head_outputs(hf, t.prompt + r, LAYERS, 4) for r in (t.chosen, t.rejected)]) for t in toks]
    )
    assert found.shape == (4, 2, 2, 4, 8)
    assert torch.allclose(found, wanted, atol=ATOL)

    vectors = gr.baselines.head_vectors(model, pairs, layers=LAYERS, n_heads=3)
    shifts = {layer: torch.zeros(4, 8) for layer in LAYERS}
    for i, (layer, head) in enumerate(vectors.heads):
        shifts[layer][head] = 1.5 * vectors.sigmas[i] * vectors.directions[i]
        weight = output_projection(hf, layer).weight.detach()
        weight = weight if architecture == "gpt2" else weight.T
        assert torch.allclose(vectors.writes[i], vectors.directions[i] @ weight.view(4, 8, 32)[head], atol=ATOL)
    moved = margins(gr.score_pairs(model, toks, vectors.hooks(1.5, scale="sigma")))
    with ExitStack() as stack:
        for layer, shift in shifts.items():
            stack.enter_context(shifted(hf, layer, shift.flatten()))
        plain = torch.cat([margin(hf, t) for t in toks])
    assert torch.allclose(moved, plain, atol=1e-4)
    assert (moved - margins(gr.score_pairs(model, toks))).abs().max() > 1e-2


def test_heads_see_the_images() -> None:
    """LLaVA: head outputs as in the plain model that is given ids and pixel values."""
    pytest.importorskip("PIL")
    family = next(f for f in FAMILIES if f.name == "LLaVA")
    model, hf = vision_bridge(family), build(family)
    pairs = [
        gr.PreferencePair(prompt="question : what is this ?", chosen=" cat", rejected=" big dog", image=picture(i))
        for i in range(3)
    ]
    toks = gr.tokens.tokenize_pairs(model, pairs)
    with gr.settings(max_tokens=60):
        found = heads_room.read_out_heads(model, toks, layers=[1])
    kept: list[Tensor] = []
    projection = hf.model.language_model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1].view(4, 8)))
    for t in toks:
        for response in (t.chosen, t.rejected):
            with torch.no_grad():
                assert t.images is not None
                hf(torch.tensor([t.prompt + response]), pixel_values=t.images.inputs["pixel_values"])
    handle.remove()
    assert torch.allclose(found.flatten(0, 1)[:, 0], torch.stack(kept), atol=ATOL)
    assert (found[0] - found[1]).abs().max() > 1e-2  # same words, other picture
    before = gr.score_pairs(model, toks)
    steered = gr.score_pairs(model, toks, gr.baselines.head_vectors(model, pairs, layers=[1]).hooks(0.5))
    assert (steered - before).abs().max() > 1e-3
    if importlib.util.find_spec("peft"):
        with gr.baselines.lora_adapter(model, pairs, n_epochs=2, learning_rate=1e-2) as run:
            assert run.losses[-1] < run.losses[0]
            assert not any("vision" in name for name in run.modules)
        assert torch.equal(gr.score_pairs(model, toks), before)


def test_probes_are_scikit_learns(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    z = heads_room.read_out_heads(bridge, toks, layers=LAYERS).double().numpy()
    labels = [1, 0] * 3
    accuracy = {}
    for row, layer in enumerate(LAYERS):
        for head in range(4):
            right = 0
            for out in range(4):  # four records, five folds asked for: each record is left out once
                rest = [i for i in range(4) if i != out]
                probe = LogisticRegression(max_iter=1000).fit(z[rest][:, :, row, head].reshape(6, -1), labels)
                right += int((probe.predict(z[out, :, row, head]) == [1, 0]).sum())
            accuracy[layer, head] = right / 8
    by_shift = gr.baselines.head_vectors(bridge, pairs, layers=LAYERS, n_heads=8)
    by_probe = gr.baselines.head_vectors(bridge, pairs, layers=LAYERS, n_heads=8, direction="probe")
    assert list(by_shift.heads) == sorted(accuracy, key=lambda h: (-accuracy[h], h))
    for i, (layer, head) in enumerate(by_shift.heads):
        own = z[:, :, LAYERS.index(layer), head]
        assert by_shift.accuracies[i].item() == pytest.approx(accuracy[layer, head])
        shift = torch.from_numpy(own[:, 0].mean(0) - own[:, 1].mean(0))
        weights = torch.from_numpy(LogisticRegression(max_iter=1000).fit(own.reshape(8, -1), [1, 0] * 4).coef_[0])
        assert cosine(by_shift.directions[i], shift) > COS
        assert cosine(by_probe.directions[i], weights) > 1 - 1e-3  # up to the solver's stopping rule
        along = own.reshape(8, -1) @ by_shift.directions[i].double().numpy()
        assert by_shift.sigmas[i].item() == pytest.approx(along.std(), rel=1e-3)


def test_alpha_of_heads_is_a_residual_step(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    """At one layer alpha moves the attention output by alpha residual norms, as a residual vector would."""
    vectors = gr.baselines.head_vectors(bridge, pairs, layers=[1], n_heads=2)
    caa = gr.baselines.baseline_vectors(bridge, pairs, ["caa"], layers=[1])["caa"]
    ids = torch.tensor([gr.tokens.tokenize_pairs(bridge, pairs)[0].prompt])
    seen: list[Tensor] = []
    for hooks in ([], vectors.hooks(0.3)):
        keep = [("blocks.1.hook_attn_out", lambda act, hook: seen.append(act.detach()))]
        with torch.no_grad():
            bridge.run_with_hooks(ids, fwd_hooks=[*hooks, *keep])
    step = (seen[1] - seen[0]).norm(dim=-1)
    assert torch.allclose(step, torch.full_like(step, 0.3 * caa.resid_norms.item()), rtol=1e-3)


def test_alpha_zero_of_heads_changes_no_bit(model: Any, pairs: list[gr.PreferencePair]) -> None:
    vectors = gr.baselines.head_vectors(model, pairs)
    assert len(vectors.heads) == 1  # 5 % of twelve
    ids = torch.tensor([gr.tokens.tokenize_pairs(model, pairs)[0].prompt])
    with torch.no_grad():
        assert torch.equal(model(ids), model.run_with_hooks(ids, fwd_hooks=vectors.hooks(0.0)))


def test_refused_heads(bridge: Any, pairs: list[gr.PreferencePair], unchecked: None) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n_heads": 5}, "have 4 heads"),
        ({"direction": "pca"}, "'mean_shift' or 'probe'"),
        ({"layers": [7]}, "do not exist"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            gr.baselines.head_vectors(bridge, pairs, **{"layers": [1], **options})
    with pytest.raises(ValueError, match="at least 2 records"):
        gr.baselines.head_vectors(bridge, pairs[:1])
    vectors = gr.baselines.head_vectors(bridge, pairs, layers=[1])
    for bad in ({"alpha": float("nan")}, {"alpha": 1.0, "scale": "raw"}):
        with pytest.raises(ValueError):
            vectors.hooks(**bad)


# -- prompting --------------------------------------------------------------------------------------------------------


def test_system_prompt_reaches_the_model(bridge: Any, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    chat = gr.PreferencePair(prompt=[{"role": "user", "content": "was it good ?"}], chosen="yes", rejected="no")
    told = gr.baselines.with_system_prompt([*pairs, chat], "we hated this film .", separator=" ")
    toks, plain = gr.tokens.tokenize_pairs(bridge, told), gr.tokens.tokenize_pairs(bridge, [*pairs, chat])
    words = [bridge.tokenizer.convert_tokens_to_ids(w) for w in "we hated this film .".split()]
    for a, b in zip(toks[:4], plain[:4], strict=True):
        assert list(a.prompt) == words + list(b.prompt)
        assert (a.chosen, a.rejected) == (b.chosen, b.rejected)
    # the tests' template writes any role but the assistant's as a question
    start = bridge.tokenizer("question : we hated this film . <eos>")["input_ids"]
    assert list(toks[4].prompt) == start + list(plain[4].prompt)
    wanted = torch.tensor([float(margin(hf, t)) for t in toks])
    assert torch.allclose(margins(gr.score_pairs(bridge, toks)), wanted, atol=1e-4)


def test_system_prompt_joins_the_one_there_is() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    pair = gr.PreferencePair(prompt=prompt, chosen="yes", rejected="no", meta={"domain": "x"})
    told = gr.baselines.with_system_prompt([pair], "Be kind.")[0]
    assert told.prompt[0] == {"role": "system", "content": "Be kind.\n\nBe brief."}
    assert told.meta == pair.meta
    assert prompt[0]["content"] == "Be brief."
    with pytest.raises(ValueError, match="empty"):
        gr.baselines.with_system_prompt([pair], "  ")


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_lora_is_a_plain_peft_run(bridge: Any, pairs: list[gr.PreferencePair], loss: Any) -> None:
    """The same records trained with peft on the Hugging Face model, loop and losses written out again."""
    peft = pytest.importorskip("peft")
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    before = margins(gr.score_pairs(bridge, toks))
    adapter = gr.baselines.lora_adapter(bridge, pairs, loss=loss, rank=2, n_epochs=4, learning_rate=1e-2, seed=7)
    with gr.settings(max_tokens=30), adapter as run:
        ours = margins(gr.score_pairs(bridge, toks))

    plain = tiny_hf()
    reference = torch.cat([margin(plain, t) for t in toks]).detach()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=names)
        tuned = peft.get_peft_model(plain, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        both = [torch.cat(side) for side in zip(*(pair_logprobs(plain, t) for t in toks), strict=True)]
        if loss == "sft":
            value = -both[0].sum() / sum(len(t.chosen) for t in toks)
        else:
            value = -torch.sigmoid(0.1 * (both[0] - both[1] - reference)).log().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    theirs = torch.cat([margin(plain, t) for t in toks]).detach()
    assert run.n_parameters == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert len(run.modules) == 3 * len(names)
    assert run.losses == pytest.approx(losses, abs=TRAINED_ATOL)
    assert torch.allclose(ours, theirs, atol=TRAINED_ATOL)
    assert (ours - before).abs().max() > 0.1
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_leaves_the_model_as_it_was(architecture: str, pairs: list[gr.PreferencePair]) -> None:
    pytest.importorskip("peft")
    model = tiny_model("bridge", architecture)
    toks = gr.tokens.tokenize_pairs(model, pairs)
    frozen = [p.requires_grad for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, id(m)) for name, m in model.named_modules()]
    hooks, state, before = list(model.hook_dict), torch.get_rng_state(), gr.score_pairs(model, toks)

    with gr.baselines.lora_adapter(model, pairs, n_epochs=2, learning_rate=1e-2) as run:
        inside = gr.score_pairs(model, toks)
        steered = gr.score_pairs(model, toks, [("blocks.1.hook_resid_post", lambda act, hook: act.roll(1, -1))])
    assert run.losses[-1] < run.losses[0]
    assert (inside - before)[:, 0].sum() > 0  # the chosen responses have become likelier
    assert (steered - inside).abs().max() > 1e-2  # hooks act on the tuned model
    with pytest.raises(KeyboardInterrupt), gr.baselines.lora_adapter(model, pairs, n_epochs=1):
        raise KeyboardInterrupt

    assert torch.equal(gr.score_pairs(model, toks), before)
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[name], value) for name, value in weights.items())
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert list(model.hook_dict) == hooks
    assert not hasattr(model.original_model, "peft_config")
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_seed(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    pytest.importorskip("peft")
    toks, found = gr.tokens.tokenize_pairs(bridge, pairs), []
    for seed in (0, 0, 1):
        with gr.baselines.lora_adapter(bridge, pairs, batch_size=2, learning_rate=1e-2, seed=seed):
            found.append(gr.score_pairs(bridge, toks))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_refused_lora(
    bridge: Any, pairs: list[gr.PreferencePair], monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    pytest.importorskip("peft")
    for options, message in (({"loss": "ppo"}, "'sft' or 'dpo'"), ({"rank": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message), gr.baselines.lora_adapter(bridge, pairs, **options):
            pass
    with gr.baselines.lora_adapter(bridge, pairs, n_epochs=1):  # noqa: SIM117
        with (
            pytest.raises(ValueError, match="already carries"),
            gr.baselines.lora_adapter(bridge, pairs),
        ):
            pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"grains-tl\[lora\]"), gr.baselines.lora_adapter(bridge, pairs):
        pass


@pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")
def test_lora_says_what_it_needs(pairs: list[gr.PreferencePair]) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="TransformerBridge"), gr.baselines.lora_adapter(tiny_model("hooked"), pairs):
        pass


# -- comparison, docstrings, the real model ---------------------------------------------------------------------------


def test_every_control_is_compared(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    toks = gr.tokens.tokenize_pairs(bridge, pairs)
    caa = gr.baselines.baseline_vectors(bridge, pairs, ["caa"], layers=[1])
    draws = gr.baselines.baseline_draws(bridge, pairs, layers=[1], n_draws=4, like=caa["caa"])
    for given, extra in ((draws, ["random tokens, sign tuned"]), ({"shuffled_labels": draws["shuffled_labels"]}, [])):
        found = gr.compare_with_controls(
            bridge, toks, toks, caa, {**given, "caa": [caa["caa"]]}, name="caa", alpha=0.2, n_test_draws=3
        )
        assert set(found.against) == {*given, *extra}
        assert list(found.table["vector"]) == ["caa", *given, *extra]
        assert found.table["p_random_tokens"].isna().iloc[0] == (extra == [])


@pytest.mark.parametrize(
    "room",
    [
        "vectors.building",
        "baselines.draws",
        "baselines.recipes",
        "baselines.heads",
        "baselines.prompting",
        "baselines.lora",
    ],
)
def test_docstring_examples_run(room: str) -> None:
    found = doctest.testmod(importlib.import_module(f"grains_tl.{room}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.real
def test_all_baselines_on_smollm2(smollm2: SimpleNamespace) -> None:
    """At one layer, on six records of each split: recipes that see the answer move its margin, chance averages out."""
    pytest.importorskip("peft")
    model, layer, alpha = smollm2.bridge, 21, 0.2
    build, test = gr.load_bundled("sentiment", "build")[:6], gr.load_bundled("sentiment", "test")[:6]
    toks = gr.tokens.tokenize_pairs(model, test)
    base = gr.score_pairs(model, toks)
    caa = gr.baselines.baseline_vectors(model, build, ["caa"], layers=[layer])["caa"]
    found = gr.baselines.baseline_vectors(model, build, list(gr.baselines.BASELINES), layers=[layer], like=caa)
    settings = [gr.evaluate.Setting(layer, v.hooks(s * alpha)) for v in found.values() for s in (1, -1)]
    _, steered = gr.evaluate.measure(model, toks, settings)
    both = margins(steered).view(-1, 2, len(toks))
    effect = dict(zip(found, ((both[:, 0] - both[:, 1]) / 2).mean(-1).tolist(), strict=True))

    heads = gr.baselines.head_vectors(model, build, layers=[layer], n_heads=3)
    up, down = (margins(gr.score_pairs(model, toks, heads.hooks(s * alpha))) for s in (1, -1))
    effect["heads"] = float((up - down).mean() / 2)
    kind, unkind = (
        margins(gr.score_pairs(model, gr.tokens.tokenize_pairs(model, gr.baselines.with_system_prompt(test, text))))
        for text in ("You love everything and praise it.", "You hate everything and complain about it.")
    )
    effect["prompt"] = float((kind - unkind).mean() / 2)
    with gr.baselines.lora_adapter(model, build, loss="dpo", n_epochs=1, batch_size=3):
        effect["lora"] = float((margins(gr.score_pairs(model, toks)) - margins(base)).mean())
    print({name: round(value, 2) for name, value in effect.items()})

    assert torch.equal(gr.score_pairs(model, toks), base)
    assert effect["caa"] > 1 and effect["icv"] > 1
    assert effect["lora"] > 0
    assert (kind - unkind).abs().max() > 0.1  # the instruction is read, whether or not it is heeded
    assert all(abs(effect[name]) < effect["caa"] for name in ("random_direction", "orthogonal_direction"))


def test_heads_of_ones_own_choice(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """Named heads are steered as if probes had chosen them, in the order given."""
    all_heads = gr.baselines.head_vectors(bridge, pairs, layers=[1], n_heads=4)
    named = gr.baselines.head_vectors(bridge, pairs, heads=[(1, 2), (1, 0)])
    assert named.heads == ((1, 2), (1, 0))
    rows = [all_heads.heads.index(head) for head in named.heads]
    torch.testing.assert_close(named.directions, all_heads.directions[rows])
    torch.testing.assert_close(named.accuracies, all_heads.accuracies[rows])
    v = named.vectors(4)
    ids = torch.tensor([gr.tokens.tokenize_pairs(bridge, pairs)[0].prompt])
    step = v.steering(2.0, v.layers, operator="add", scale="raw")
    with torch.no_grad():
        wanted = bridge.run_with_hooks(ids, fwd_hooks=named.hooks(2.0, scale="sigma"))
        torch.testing.assert_close(bridge.run_with_hooks(ids, fwd_hooks=step.hooks()), wanted, atol=1e-5, rtol=1e-5)
    bad: list[dict[str, Any]] = [{"heads": []}, {"heads": [(1, 4)]}, {"heads": [(3, 0)]}, {"heads": [(1, 0), (1, 0)]}]
    for options in [*bad, {"heads": [(1, 0)], "n_heads": 1}, {"heads": [(1, 0)], "layers": [1]}]:
        with pytest.raises(ValueError, match="heads"):
            gr.baselines.head_vectors(bridge, pairs, **options)


# -- functions of one's own ---------------------------------------------------------------------------------------------
def test_two_functions_of_one_name_are_refused(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    """They used to overwrite each other, so that one of them was never measured."""
    functions = [lambda records, generator: records.response_differences[0] for _ in range(2)]
    with pytest.raises(ValueError, match="two recipes are called <lambda>"):
        gr.baselines.baseline_vectors(bridge, pairs, functions, layers=[1])
    with pytest.raises(ValueError, match="two recipes are called caa"):
        gr.baselines.baseline_vectors(bridge, pairs, ["caa", "caa"], layers=[1])


def test_the_manifest_has_the_seed_of_a_function_that_draws(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    def drawn(records: Any, generator: torch.Generator) -> torch.Tensor:
        return records.response_differences[int(torch.randint(0, 4, (), generator=generator))]

    def fixed(records: Any, generator: torch.Generator) -> torch.Tensor:
        return records.response_differences[0]

    found = [gr.build_vectors(bridge, pairs, recipe=f, layers=[1]).info["seed"] for f in (drawn, fixed)]
    assert found == [0, None]
