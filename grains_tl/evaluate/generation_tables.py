"""Continuations without and with steering as one table: what they are like, what they cost, and where along the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from grains_tl._util.stats import mean_interval, tails
from grains_tl.evaluate.generated import TOKEN_MEASURES, require_same_hooks, token_costs
from grains_tl.evaluate.quality import quality_table
from grains_tl.evaluate.records import require_columns
from grains_tl.inference.continuations import Continuations
from grains_tl.inference.generation import GenerationHooks
from grains_tl.records.pairs import plain_text
from grains_tl.types import HookedModel, Text

#: What to give where another table came.
PER_TEXT = "the table of generation_quality"

#: Resamples of the prompts behind each interval.
N_RESAMPLES = 1000

#: Columns of which a summary takes means over texts.
TEXT_MEASURES = ("repetition", "distinct_1", "distinct_2", "degenerate", "words")


def generation_quality(
    model: HookedModel,
    prompts: Text | Iterable[Text],
    fwd_hooks: GenerationHooks,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    n_samples: int = 1,
    seed: int = 0,
    images: Sequence[Any] | None = None,
) -> pd.DataFrame:
    """Continuations without and with hooks: what they cost at every generated token, and signs of degenerate text.

    ``summarize`` of the table gives means and quantiles with intervals over prompts; ``plot_generation_kl`` draws where
    along the text the KL is spent.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        prompts: texts or conversations, or one of them.
        fwd_hooks: a ``Steering``, or hooks as in ``generate``.
        max_new_tokens: of each continuation.
        temperature: 0 for greedy decoding, else sampling.
        n_samples: continuations of each prompt, if they are sampled.
        seed: of the samples.
        images: for vision-language models, one entry per prompt.

    Returns:
        One row per prompt and sample: ``prompt``, ``base_text``, ``text``, and the columns of ``text_quality`` (counts and
        shares), with ``base_`` in front for the unsteered text. Along the steered text, over its ``n_tokens`` tokens:
        ``kl``, ``kl_p50`` and ``kl_p95`` (mean, median and 95 % quantile of KL(steered || base), nats per token),
        ``entropy`` of the steered distribution (nats), ``perplexity`` of the text under the unsteered model, ``agreement``
        (share of tokens where both have the same likeliest one). ``base_n_tokens``, ``base_entropy`` and
        ``base_perplexity`` are those of the unsteered model along its own text.
        ``kl_by_token`` lists the KL at each token; ``prompt_number`` and ``sample`` count from 0.

    Raises:
        ValueError: what ``generate`` refuses, or a list of hooks that acts otherwise in a run over the whole text.

    Examples:
        >>> table = generation_quality(model, prompts, vectors.steering(0.2, 12))            # doctest: +SKIP
        >>> summarize(table)[["measure", "steered", "base", "low", "high"]]                 # doctest: +SKIP
    """
    texts = Continuations(prompts, max_new_tokens, temperature, n_samples, seed, images=images)
    parts = []
    asked = [plain_text(p) for p in texts.prompts]
    for sample, (before, after) in enumerate(zip(texts.of(model, None), texts.of(model, fwd_hooks), strict=True)):
        if temperature == 0:
            require_same_hooks(model, after, fwd_hooks)
        table = quality_table(asked, [one.text(model) for one in before], [one.text(model) for one in after])
        steered = [_along(x.numpy(), "nll") for x in token_costs(model, after, fwd_hooks)]
        base = [_along(x.numpy(), "base_") for x in token_costs(model, before, None)]
        columns = pd.concat([pd.DataFrame(steered), pd.DataFrame(base)], axis=1)
        parts.append(pd.concat([table.assign(prompt_number=range(len(asked)), sample=sample), columns], axis=1))
    return pd.concat(parts, ignore_index=True)


def _along(values: NDArray[np.floating], kind: str) -> dict[str, Any]:
    """The columns of one text; NaN for a text without tokens."""
    named = dict(zip(TOKEN_MEASURES, values.astype(float), strict=True))
    mean = {name: float(x.mean()) if len(x) else np.nan for name, x in named.items()}
    if kind == "base_":
        shown = {"n_tokens": values.shape[1], "entropy": mean["base_entropy"], "perplexity": np.exp(mean["base_nll"])}
        return {f"base_{name}": value for name, value in shown.items()}
    kl = named["kl"]
    p50, p95 = np.quantile(kl, [0.5, 0.95]) if len(kl) else (np.nan, np.nan)
    return {
        "n_tokens": len(kl),
        "kl": mean["kl"],
        "kl_p50": float(p50),
        "kl_p95": float(p95),
        "entropy": mean["entropy"],
        "perplexity": float(np.exp(mean["base_nll"])),
        "agreement": mean["agreement"],
        "kl_by_token": kl.tolist(),
    }


def is_generation_table(frame: Any) -> bool:
    """Whether a table is one of ``generation_quality``."""
    return isinstance(frame, pd.DataFrame) and "kl_by_token" in frame


def summarize_generations(frame: pd.DataFrame, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """One row per measure, with intervals over prompts.

    Args:
        frame: from ``generation_quality``; with a column ``vector``, each on its own.
        level: of the intervals.
        seed: of the resampling of prompts.

    Returns:
        ``vector`` (if given), ``measure``, ``steered``, ``base``, ``change`` (their difference), ``low`` and ``high`` (its
        interval), ``n`` (prompts). ``kl``, ``kl_p50`` and ``kl_p95`` are taken over the tokens of all texts (their base is
        0); entropies and perplexities weigh texts by their tokens; the rest are means over texts.
    """
    require_columns(frame, ("prompt_number", "sample", "kl_by_token", "n_tokens", "base_n_tokens"), PER_TEXT)
    groups: Iterator[tuple[Any, pd.DataFrame]] = (
        iter(frame.groupby("vector", sort=False)) if "vector" in frame else iter([(None, frame)])
    )
    rows = []
    for vector, group in groups:
        parts = [part for _, part in group.groupby("prompt_number", sort=True)]
        rng = np.random.default_rng(seed)
        draws = rng.integers(0, len(parts), (N_RESAMPLES, len(parts)))
        for measure, of_side in _measures(parts).items():
            every = np.arange(len(parts))
            steered, base = (of_side(every, side) for side in ("", "base_"))
            resampled = np.array([of_side(draw, "") - of_side(draw, "base_") for draw in draws])
            low, high = np.quantile(resampled, tails(level)) if len(parts) > 1 else (np.nan, np.nan)
            named = {} if vector is None else {"vector": vector}
            values = {"steered": steered, "base": base, "change": steered - base, "low": low, "high": high}
            rows.append({**named, "measure": measure, **values, "n": len(parts)})
    return pd.DataFrame(rows)


def _measures(parts: Sequence[pd.DataFrame]) -> dict[str, Callable[[NDArray[np.int64], str], float]]:
    """From some prompts (their places) and a side (``""`` or ``"base_"``) to each measure."""
    kl = [np.concatenate([np.asarray(x, dtype=float) for x in part["kl_by_token"]]) for part in parts]

    def of_tokens(statistic: Callable[[NDArray[np.float64]], Any]) -> Callable[[NDArray[np.int64], str], float]:
        return lambda places, side: 0.0 if side else float(statistic(np.concatenate([kl[i] for i in places])))

    def sums(column: str, side: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Total over tokens, and number of tokens, of each prompt."""
        total, count = [], []
        for part in parts:
            n = part[f"{side}n_tokens"].to_numpy(dtype=float)
            values = part[f"{side}{column}"].to_numpy(dtype=float)
            values = np.log(values) if column == "perplexity" else values
            total.append(float(np.nansum(values * n)))
            count.append(float(n.sum()))
        return np.array(total), np.array(count)

    def per_token(column: str) -> Callable[[NDArray[np.int64], str], float]:
        both = {side: sums(column, side) for side in ("", "base_")}

        def of(places: NDArray[np.int64], side: str) -> float:
            total, count = both[side]
            mean = total[places].sum() / max(count[places].sum(), 1.0)
            return float(np.exp(mean) if column == "perplexity" else mean)

        return of

    def per_text(column: str) -> Callable[[NDArray[np.int64], str], float]:
        both = {
            side: np.array([part[f"{side}{column}"].mean() for part in parts], dtype=float) for side in ("", "base_")
        }
        return lambda places, side: float(both[side][places].mean())

    def quantile(share: float) -> Callable[[NDArray[np.int64], str], float]:
        return of_tokens(lambda x: np.quantile(x, share) if len(x) else 0.0)

    return {
        "kl": of_tokens(lambda x: x.mean() if len(x) else 0.0),
        "kl_p50": quantile(0.5),
        "kl_p95": quantile(0.95),
        **{name: per_token(name) for name in ("entropy", "perplexity")},
        **{name: per_text(name) for name in TEXT_MEASURES},
    }


def generation_curve(frame: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """KL over generated positions.

    Args:
        frame: from ``generation_quality``; with a column ``vector``, each on its own.
        level: of the intervals.

    Returns:
        ``vector``, ``position`` (of the generated token, from 1), ``kl`` (mean over the prompts that go on so far, nats),
        ``low``, ``high`` (Student's t over prompts), ``p95`` over texts, ``n`` prompts.
    """
    require_columns(frame, ("prompt_number", "kl_by_token"), PER_TEXT)
    long = frame.assign(vector=frame.get("vector", "steered")).explode("kl_by_token")
    long = long.dropna(subset="kl_by_token")
    long["position"] = long.groupby(["vector", "prompt_number", "sample"], sort=False).cumcount() + 1
    long["kl"] = long["kl_by_token"].astype(float)
    rows = []
    for (vector, position), group in long.groupby(["vector", "position"], sort=False):
        by_prompt = group.groupby("prompt_number")["kl"].mean().to_numpy()
        mean, _, low, high = mean_interval(by_prompt, level)
        p95 = float(group["kl"].quantile(0.95))
        rows.append(
            {
                "vector": vector,
                "position": position,
                "kl": mean,
                "low": low,
                "high": high,
                "p95": p95,
                "n": len(by_prompt),
            }
        )
    return pd.DataFrame(rows)
