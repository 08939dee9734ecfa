"""SmolLM2 itself: both classes against the plain Hugging Face model, captum and plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor
from transformers import AutoModelForCausalLM

import grains_tl as gr
from grains_tl.inference.batches import scoring_batch
from grains_tl.inference.logprobs import batch_logprobs
from grains_tl.models.loading import _bundled_gguf
from tests.conftest import KINDS, TL_MAJOR
from tests.helpers.oracles import edited, greedy, margin, pair_logprobs, relative_error, residuals, steered

pytestmark = pytest.mark.real

LOGIT_ATOL = 2e-3  # logits are some 10 to 20; float32 sums in another order over 30 layers
LOGPROB_ATOL = 1e-4  # most of the rounding is common to all logits and cancels in a log-probability
CAPTUM_RTOL = 1e-3  # gradients near a zero embedding are large (RMSNorm), which amplifies rounding
NORM_RTOL = 1e-5  # one multiplication and two norms in float32
MIN_CORRELATION = 0.999  # two classes, same formula: only rounding may differ
FAR = 0.1  # a change of the logits that is no rounding
LAYER, HEAD = 12, 4
N_NEW = 15
PROMPT = "The soup was delicious, but the waiter was rude from start to finish. Overall, the evening was"


@pytest.fixture(scope="module")
def plain(smollm2: SimpleNamespace) -> Any:
    """The same file read by transformers alone."""
    file = _bundled_gguf()
    assert file is not None
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=KINDS)
def real(request: pytest.FixtureRequest, smollm2: SimpleNamespace) -> Any:
    """SmolLM2 as every class that this TransformerLens has."""
    return getattr(smollm2, request.param)


@pytest.fixture(scope="module")
def ids(smollm2: SimpleNamespace) -> Tensor:
    """``[1, pos]`` ids of the prompt."""
    return torch.tensor([smollm2.tokenizer(PROMPT)["input_ids"]])


@pytest.fixture(scope="module")
def direction(plain: Any) -> Tensor:
    """A direction that carries something: the unembedding of one word minus that of another."""
    words = plain.lm_head.weight[[7, 4000]]
    return words[0] - words[1]


@pytest.fixture(scope="module")
def step(direction: Tensor, plain: Any, ids: Tensor) -> Tensor:
    """Half the typical residual norm along the direction."""
    typical = residuals(plain, ids[0].tolist())[LAYER].norm(dim=-1).median()
    return 0.5 * typical * direction / direction.norm()


def steering(step: Tensor, alpha: float = 1.0, layer: int = LAYER) -> Any:
    """Our hooks for one step."""
    length = step.norm()[None]
    vectors = gr.SteeringVectors((step / length)[None], (layer,), torch.ones(1), length)
    return vectors.hooks(alpha)


def logits_of(model: Any, ids: Tensor, hooks: Any = ()) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(ids, fwd_hooks=list(hooks))


def plain_logits(plain: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return plain(ids).logits


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def records() -> list[gr.PreferencePair]:
    """Responses of one token and of several, prompts of different lengths."""
    return [*gr.load_bundled("sentiment", "test")[:2], *gr.load_bundled("misconceptions", "test")[:2]]


# -- the unchanged model ----------------------------------------------------------------------------------------------


def test_logits_equal_hugging_face(real: Any, plain: Any, ids: Tensor) -> None:
    assert largest_difference(logits_of(real, ids), plain_logits(plain, ids)) < LOGIT_ATOL


def test_response_logprobs_equal_hugging_face(real: Any, plain: Any) -> None:
    tokenized = gr.tokens.tokenize_pairs(real, records())
    assert any(len(t.chosen) > 1 for t in tokenized)
    with torch.no_grad():
        wanted = torch.stack([torch.cat(pair_logprobs(plain, t)) for t in tokenized])
    assert largest_difference(gr.score_pairs(real, tokenized), wanted) < LOGPROB_ATOL


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(real: Any, plain: Any, side: str) -> None:
    tokenized = gr.tokens.tokenize_pairs(real, records()[1:3])
    batch = scoring_batch(real, tokenized, padding_side=side)
    assert bool((batch.attention_mask == 0).any())
    with torch.no_grad():
        found = batch_logprobs(real, batch)
        wanted = torch.stack([torch.cat(pair_logprobs(plain, t)) for t in tokenized])
    assert largest_difference(found, wanted) < LOGPROB_ATOL


# -- attribution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundled", [True, False])
def test_integrated_gradients_equal_captum(real: Any, plain: Any, bundled: bool) -> None:
    """A bundled record, and a short one with responses of several tokens."""
    several = gr.PreferencePair("The food was cold. Dinner was", " a very great joy", " an awful disappointment")
    record = gr.load_bundled("sentiment", "build")[0] if bundled else several
    (pair,) = gr.tokens.tokenize_pairs(real, [record])
    assert bundled or min(len(pair.chosen), len(pair.rejected)) > 1
    found = gr.attribute(
        real, record, method="integrated_gradients", n_steps=8, reference="zero", nodes="gauss_legendre"
    )
    embeds = plain.get_input_embeddings()(torch.tensor([pair.prompt]))
    captum = IntegratedGradients(lambda x: margin(plain, pair, prompt_embeds=x))
    wanted = captum.attribute(embeds, torch.zeros_like(embeds), n_steps=8, method="gausslegendre").sum(-1)[0]
    assert relative_error(found.scores, wanted.float()) < CAPTUM_RTOL


@pytest.mark.skipif(TL_MAJOR >= 4, reason="removed in TL 4")
@pytest.mark.parametrize("method", ["integrated_gradients", "leave_one_out"])
def test_both_classes_attribute_alike(smollm2: SimpleNamespace, method: Any) -> None:
    record = gr.load_bundled("sentiment", "build")[1]
    one, other = (gr.attribute(m, record, method=method, n_steps=8) for m in (smollm2.bridge, smollm2.hooked))
    assert float(torch.corrcoef(torch.stack([one.scores, other.scores]))[0, 1]) > MIN_CORRELATION


# -- steering ---------------------------------------------------------------------------------------------------------


def test_steered_logits_equal_a_plain_hook(real: Any, plain: Any, ids: Tensor, step: Tensor) -> None:
    with edited(plain, LAYER, lambda act: steered(act, step, renorm=True)):
        wanted = plain_logits(plain, ids)
    assert largest_difference(wanted, plain_logits(plain, ids)) > FAR
    assert largest_difference(logits_of(real, ids, steering(step)), wanted) < LOGIT_ATOL


def test_steered_continuation_equals_a_plain_hook(real: Any, plain: Any, ids: Tensor, step: Tensor) -> None:
    prompt = ids[0].tolist()
    wanted = greedy(plain, prompt, N_NEW, LAYER, lambda act: steered(act, step, renorm=True))
    assert wanted != greedy(plain, prompt, N_NEW)
    found = gr.generate(real, [PROMPT], steering(step), max_new_tokens=N_NEW)
    assert found == [real.tokenizer.decode(wanted, skip_special_tokens=True)]


def test_norms_are_kept(real: Any, ids: Tensor, step: Tensor) -> None:
    seen: list[Tensor] = []

    def keep(act: Tensor, hook: Any) -> None:
        seen.append(act.clone())

    hooks = steering(step)
    name = hooks[0][0]
    logits_of(real, ids, [(name, keep), *hooks, (name, keep)])
    before, after = seen
    norms = before.norm(dim=-1)
    assert float(((after.norm(dim=-1) - norms).abs() / norms).max()) < NORM_RTOL
    assert relative_error(after, before) > NORM_RTOL
    assert float(torch.cosine_similarity(before, after, dim=-1).min()) < 1 - FAR  # and it did turn


def test_alpha_zero_changes_no_bit(real: Any, ids: Tensor, step: Tensor) -> None:
    assert torch.equal(logits_of(real, ids, steering(step, alpha=0.0)), logits_of(real, ids))


def test_nothing_stays_after_an_exception(real: Any, ids: Tensor, step: Tensor) -> None:
    def fail(act: Tensor, hook: Any) -> None:
        raise RuntimeError("stopped on purpose")

    before = logits_of(real, ids)
    with pytest.raises(RuntimeError, match="on purpose"):
        gr.generate(real, [PROMPT], [*steering(step), (f"blocks.{LAYER + 1}.hook_resid_post", fail)])
    with pytest.raises(RuntimeError, match="on purpose"):
        gr.score_pairs(real, gr.tokens.tokenize_pairs(real, records()[:1]), [*steering(step), ("hook_embed", fail)])
    assert torch.equal(logits_of(real, ids), before)


@contextmanager
def head_taken_out(plain: Any) -> Iterator[None]:
    """Zero one head's output before the output projection, with a plain PyTorch hook."""
    projection = plain.model.layers[LAYER].self_attn.o_proj
    width = plain.config.hidden_size // plain.config.num_attention_heads

    def zero(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., HEAD * width : (HEAD + 1) * width] = 0
        return (z, *args[1:])

    handle = projection.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("steering_first", [True, False])
def test_a_patching_hook_beside_ours(real: Any, plain: Any, ids: Tensor, step: Tensor, steering_first: bool) -> None:
    def zero_head(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, HEAD] = 0
        return z

    theirs, ours = [(f"blocks.{LAYER}.attn.hook_z", zero_head)], steering(step)
    with ExitStack() as stack:
        stack.enter_context(edited(plain, LAYER, lambda act: steered(act, step, renorm=True)))
        only_steered = plain_logits(plain, ids)
        stack.enter_context(head_taken_out(plain))
        wanted = plain_logits(plain, ids)
    assert largest_difference(only_steered, wanted) > FAR
    hooks = ours + theirs if steering_first else theirs + ours
    assert largest_difference(logits_of(real, ids, hooks), wanted) < LOGIT_ATOL


@pytest.mark.skipif(TL_MAJOR < 4, reason="TransformerLens 3 has the class")
def test_hooked_transformer_is_refused_with_the_fix() -> None:
    with pytest.raises(ImportError, match="kind='bridge'.*grains-tl\\[hooked\\]"):
        gr.load_model("smollm2", kind="hooked")
