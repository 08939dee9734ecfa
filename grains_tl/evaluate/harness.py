"""Any task of lm-evaluation-harness, on a model with our hooks on (extra ``evals``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from grains_tl._util.progress import progress_bar
from grains_tl.evaluate.model_args import steered_model
from grains_tl.inference.batches import batch_of, by_token_budget
from grains_tl.inference.generation import GenerationHooks, generate
from grains_tl.inference.logprobs import HooksForBatch, hooks_for
from grains_tl.inference.objectives import token_logprobs
from grains_tl.models.running import forward_logits
from grains_tl.tokens.chat import render
from grains_tl.tokens.prompts import text_ids
from grains_tl.tokens.rules import token_rules
from grains_tl.tokens.text import common_prefix, last_tokens
from grains_tl.types import HookedModel

#: Tokens generated where a task sets no limit, as in lm-evaluation-harness' own models.
MAX_NEW_TOKENS = 256

#: Prompts per batch of generation.
BATCH_SIZE = 8

#: What lm-evaluation-harness calls the adapter.
NAME = "grains_tl"


def adapter(
    model: HookedModel,
    fwd_hooks: HooksForBatch | None = None,
    *,
    generation_hooks: GenerationHooks | None = None,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """The model as an ``lm_eval.api.model.LM``: every request runs with the hooks on.

    Context and continuation are tokenized together, the context's tokens are those that both share, and BOS is put where
    ``token_rules`` says, as everywhere in the package. A continuation has the same log-likelihood as in
    ``score_choices``, and as in lm-evaluation-harness' own ``hf`` model, unless a token merges across the border: there
    ``score_choices`` moves the border for all choices of a question, here each continuation stands alone.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.
        generation_hooks: hooks for ``generate_until``, as ``generate`` takes them, where ``fwd_hooks`` is a function;
            default ``fwd_hooks``.
        batch_size: prompts per batch of generation.

    Returns:
        An ``LM`` for ``lm_eval.simple_evaluate(model=...)``. It answers ``loglikelihood``, ``loglikelihood_rolling`` and
        ``generate_until``; requests that are too long for the context lose their beginning.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: during the run: generation with hooks that are a function of a batch, and no ``generation_hooks``.

    Examples:
        >>> import lm_eval                                                                      # doctest: +SKIP
        >>> steered = adapter(model, vectors.steering(0.2, 12))                                 # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model=steered, tasks=["truthfulqa_mc1"])["results"]         # doctest: +SKIP
    """
    return _adapter_class()(model, fwd_hooks, generation_hooks, batch_size)


@functools.cache
def _adapter_class() -> Any:
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError("the adapter needs lm-evaluation-harness: pip install 'grains-tl[evals]'") from error

    class HookedLM(LM):
        """``LM`` over a hooked model; see ``adapter``."""

        def __init__(
            self,
            model: Any,
            fwd_hooks: Any,
            generation_hooks: Any,
            batch_size: int,
        ) -> None:
            super().__init__()
            self.model, self.fwd_hooks, self.generation_hooks = model, fwd_hooks, generation_hooks
            self.batch_size = batch_size

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(self.model.tokenizer, "name_or_path", "") or "tokenizer")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return render(
                self.model.tokenizer,
                chat_history,
                "the task's conversation",
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            spans = [_split(self.model, *request.args) for request in requests]
            return _score(self.model, spans, self.fwd_hooks)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            windows = [_windows(self.model, request.args[0]) for request in requests]
            spans = [span for several in windows for span in several]
            scores = iter(_score(self.model, spans, self.fwd_hooks))
            return [sum(next(scores)[0] for _ in several) for several in windows]

        def generate_until(self, requests: list[Any]) -> list[str]:
            hooks = self.fwd_hooks if self.generation_hooks is None else self.generation_hooks
            if self.generation_hooks is None and callable(hooks):
                raise ValueError(
                    "fwd_hooks is a function of a batch, which generation has none of; give a Steering "
                    "instead, or generation_hooks= too (a list, or a function prompt_len -> hooks)"
                )
            return _generated(self.model, [request.args for request in requests], hooks, self.batch_size)

    return HookedLM


def register() -> str:
    """Make the adapter known to lm-evaluation-harness as ``--model grains_tl``, in this process; its name is returned.

    lm-evaluation-harness looks up models in a table of its own and finds no plugins, so from a shell
    ``grains-tl lm-eval run --model grains_tl --model_args pretrained=smollm2,vectors=v.safetensors --tasks ...`` calls this
    first and then is ``lm_eval`` itself.

    Raises:
        ImportError: lm-eval is not installed.

    Examples:
        >>> register()                                                                          # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model="grains_tl", model_args="pretrained=smollm2", ...)    # doctest: +SKIP
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ImportError("this needs lm-evaluation-harness: pip install 'grains-tl[evals]'") from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:RegisteredLM")
    return NAME


@functools.cache
def _registered_class() -> Any:
    class RegisteredLM(_adapter_class()):  # type: ignore[misc]
        """Made by lm-evaluation-harness from ``--model_args``; see ``steered_model`` for what they may be."""

        def __init__(
            self, pretrained: Any = None, batch_size: Any = None, max_batch_size: Any = None, **given: Any
        ) -> None:
            device = str(given.pop("device", None) or "cpu")
            # their command asks for cuda:0 by itself, and their own models go to the CPU where there is none
            device = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
            name = None if pretrained is None else str(pretrained)
            model, steering = steered_model(name, {**given, "device": device})
            super().__init__(model, steering, None, int(batch_size) if str(batch_size).isdigit() else BATCH_SIZE)

    return RegisteredLM


def __getattr__(name: str) -> Any:
    """``RegisteredLM``, for the registry, which imports it by name."""
    if name == "RegisteredLM":
        return _registered_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _split(model: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both; white space at the end of the context counts to the continuation, as lm-evaluation-harness has it."""
    words = context.rstrip()
    whole = text_ids(model, context + continuation)
    border = common_prefix(text_ids(model, words), whole) if words else 0
    if border == 0:
        return _prefixed(model, whole)
    if border == len(whole):
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own; a task needs some text to score")
    return whole[:border], whole[border:]


def _windows(model: Any, text: str) -> list[tuple[list[int], list[int]]]:
    """A long text in pieces that fit the context, each token scored once; the first is predicted from BOS or end-of-text."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    prefix, ids = _prefixed(model, text_ids(model, text))
    n_ctx = token_rules(model).n_ctx
    windows = get_rolling_token_windows(token_list=ids, prefix_token=prefix[-1], max_seq_len=n_ctx, context_len=1)
    return [(list(context), list(ids)) for context, ids in map(make_disjoint_window, windows)]


def _prefixed(model: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that stand before a text, and the text's ids without them."""
    rules, bos = token_rules(model), model.tokenizer.bos_token_id
    n = len(rules.front)
    if n:
        return list(rules.front), ids[n:] if tuple(ids[:n]) == rules.front else ids
    return [bos if bos in range(int(model.cfg.d_vocab)) else rules.eos], ids


def _score(
    model: Any,
    spans: Sequence[tuple[list[int], list[int]]],
    fwd_hooks: HooksForBatch | None,
) -> list[tuple[float, bool]]:
    """Log-likelihood (nats) of each span's continuation, and whether greedy decoding would have written it."""
    n_ctx = token_rules(model).n_ctx
    longest = max((len(continuation) for _, continuation in spans), default=0)
    if longest > n_ctx:
        raise ValueError(f"a continuation of {longest} tokens does not fit the model's context of {n_ctx}")
    inputs = [(context + continuation)[-(n_ctx + 1) : -1] for context, continuation in spans]
    out: list[tuple[float, bool]] = [(0.0, True)] * len(spans)
    with torch.no_grad(), progress_bar(total=len(spans), desc="score", unit="request") as bar:
        for group in by_token_budget([len(ids) for ids in inputs]):
            targets, prompt_lens = [], []
            for row, i in enumerate(group):
                start = len(inputs[i]) - len(spans[i][1])
                targets += [(row, start + t, token, 1.0, row) for t, token in enumerate(spans[i][1])]
                prompt_lens.append(start + 1)
            rows = [inputs[i] for i in group]
            batch = batch_of(model, rows, range(len(group)), prompt_lens, targets, len(group))
            hooks = hooks_for(fwd_hooks, batch)
            logits = forward_logits(model, batch.ids, batch.attention_mask, batch.keep, hooks)
            logits = logits[batch.target_row, batch.target_keep]
            logprobs = token_logprobs(logits, batch.target_id).cpu().double()
            missed = (logits.argmax(-1) != batch.target_id).cpu().double()
            total = torch.zeros(len(group), 2, dtype=torch.float64)  # on the CPU: Apple GPUs have no such numbers
            total.index_add_(0, batch.target_row.cpu(), torch.stack([logprobs, missed], dim=1))
            for i, (logprob, misses) in zip(group, total.tolist(), strict=True):
                out[i] = (logprob, misses == 0)
            bar.update(len(group))
    return out


def _generated(
    model: Any, requests: Sequence[tuple[str, dict[str, Any]]], hooks: GenerationHooks | None, batch_size: int
) -> list[str]:
    """The answer to every (prompt, settings): requests with the same settings in batches of similar length."""
    texts = [""] * len(requests)
    settings: dict[tuple[int, float], list[int]] = {}
    for i, (_, options) in enumerate(requests):
        settings.setdefault(_generation_settings(options), []).append(i)
    with progress_bar(total=len(requests), desc="generate", unit="prompt") as bar:
        for (limit, temperature), places in settings.items():
            # similar lengths together: a batch is padded to its longest
            places = sorted(places, key=lambda i: len(requests[i][0]))
            for start in range(0, len(places), batch_size):
                some = places[start : start + batch_size]
                made = generate(
                    model,
                    [_shortened(model, requests[i][0], limit) for i in some],
                    hooks,
                    max_new_tokens=limit,
                    temperature=temperature,
                    batch_size=batch_size,
                    seed=start,
                )
                for i, text in zip(some, made, strict=True):
                    texts[i] = _until(text, requests[i][1])
                bar.update(len(some))
    return texts


def _generation_settings(settings: dict[str, Any]) -> tuple[int, float]:
    """Limit and temperature of a task's ``generation_kwargs`` (ValueError for what ``generate`` cannot do)."""
    sampled = bool(settings.get("do_sample", False))
    only_sampling = {"top_p", "top_k", "min_p"}
    known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature"} | (
        set() if sampled else only_sampling
    )
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"generation_kwargs {unknown} are not supported; there are {sorted(known)}")
    limit = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)))
    return limit, float(settings.get("temperature", 1.0)) if sampled else 0.0


def _shortened(model: Any, prompt: str, limit: int) -> str:
    """The end of a prompt that leaves ``limit`` positions of the context for new tokens."""
    most = token_rules(model).n_ctx - limit
    if most < 1 or len(text_ids(model, prompt)) <= most:  # with a limit beyond the context, generate says so
        return prompt
    ends = (last_tokens(model.tokenizer, prompt, n) for n in range(most, 0, -1))
    return next((end for end in ends if len(text_ids(model, end)) <= most), prompt)


def _until(text: str, settings: dict[str, Any]) -> str:
    """The text before the first of the task's stop strings."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
