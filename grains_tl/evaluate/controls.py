"""Vectors against their controls on a test split: one table with every kind of uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.checks import whole
from grains_tl._util.stats import centred_interval, compare, mean_and_se, resampled_means
from grains_tl.evaluate.measuring import swings
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.steering_vectors import SteeringVectors

RANDOM_TOKENS = "random tokens"


SIGN_TUNED = "random tokens, sign tuned"


@dataclass(frozen=True)
class Comparison:
    """Effects of vectors and controls.

    Attributes:
        table: one row per vector and control: ``vector``, ``effect`` (the swing of the margin in nats, as ``estimand``
            says; mean over test records, for controls over draws), ``se``, ``low`` and ``high`` (95 %), ``interval``
            (over what), ``n_draws``, ``n``, ``p_random_tokens`` (share of random-token draws with at least this effect,
            on the same records).
        draws: mean effect of every draw, by name.
        base: ``[record]`` unsteered margins of the test split, nats.
        against: for every random control, how far the named vector lies above it (``_util.stats.compare``).

    Examples:
        >>> found = compare_with_controls(                                                    # doctest: +SKIP
        ...     model, choose, test, {"ours": vectors}, draws, name="ours", alpha=0.2, n_test_draws=20)
        >>> found.table[["vector", "effect", "low", "high"]]                                  # doctest: +SKIP
    """

    table: pd.DataFrame
    draws: dict[str, list[float]]
    base: Float[Tensor, "record"]
    against: dict[str, dict[str, float]]


def compare_with_controls(
    model: HookedModel,
    choose: Records,
    test: Records,
    vectors: Mapping[str, SteeringVectors],
    draws: Mapping[str, Sequence[SteeringVectors]],
    *,
    name: str,
    alpha: float,
    n_test_draws: int,
    seed: int = 0,
) -> Comparison:
    """Measure vectors on the whole test split and many draws on its first part, all at one size.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        choose: records on which each random-token draw may tune its sign, a sceptic's control; tokenized or not.
        test: records to report on, tokenized or not.
        vectors: single-layer vectors by name.
        draws: controls by any name (see ``baseline_draws`` and ``controls``), and bootstrap vectors under the name of
            the vector they belong to. ``"random_tokens"``, if there, also gives the control with tuned signs and
            ``p_random_tokens``.
        name: the vector that is compared with the controls.
        alpha: step, fraction of the layer's typical residual norm.
        n_test_draws: test records the draws are measured on.
        seed: of the resampling.

    Returns:
        ``Comparison``; effects in nats, half the change of the margin between +alpha and -alpha.

    Raises:
        ValueError: ``name`` without bootstrap vectors in ``draws``, no test records for the draws, or vectors of several
            layers.

    Examples:
        >>> vectors = baseline_vectors(model, build, ["caa"], layers=[21])              # doctest: +SKIP
        >>> controls = baseline_draws(model, build, layers=[21], like=vectors["caa"])   # doctest: +SKIP
        >>> draws = {**controls, "caa": bootstrap_vectors(caa_differences(...))}        # doctest: +SKIP
        >>> compare_with_controls(model, choose, test, vectors, draws, name="caa",      # doctest: +SKIP
        ...                       alpha=0.2, n_test_draws=20).table
    """
    if name not in vectors or name not in draws:
        raise ValueError(
            f"name={name!r} needs a vector in vectors and its bootstrap vectors in draws; there are {list(vectors)} and "
            f"{list(draws)}"
        )
    n_test_draws = whole("n_test_draws", n_test_draws, 1)
    if not test:
        raise ValueError("no test records; expected at least one")
    choose, test = as_tokenized(model, choose), as_tokenized(model, test)
    base, found = swings(model, test, list(vectors.values()), alpha)
    part = test[:n_test_draws]
    names = [label for label, group in draws.items() for _ in group]
    _, drawn = swings(model, part, [v for group in draws.values() for v in group], alpha)
    samples = {label: drawn[[i for i, n in enumerate(names) if n == label]] for label in draws}
    tokens = _random_tokens(draws)
    if tokens is not None:
        _, tuning = swings(model, choose, draws[tokens], alpha)
        samples[SIGN_TUNED] = samples[tokens] * tuning.mean(-1, keepdim=True).sign()
    controls = [label for label in samples if label not in vectors]
    own = dict(zip(vectors, found, strict=True))

    rows = [_vector_row(label, effect, samples, len(part), seed) for label, effect in own.items()]
    rows += [_control_row(label, samples[label]) for label in controls]
    return Comparison(
        table=pd.DataFrame(rows).assign(estimand="swing"),
        draws={label: s.mean(-1).tolist() for label, s in samples.items()},
        base=base,
        against={
            label: compare(own[name][: len(part)], samples[name], samples[label], seed=seed) for label in controls
        },
    )


def _random_tokens(labels: Iterable[str]) -> str | None:
    """The label of the random-token draws: the demo writes it as words, ``baseline_draws`` as a name."""
    return next((label for label in labels if label.replace("_", " ") == RANDOM_TOKENS), None)


def _vector_row(
    label: str, effect: Float[Tensor, "record"], samples: Mapping[str, Tensor], n_part: int, seed: int
) -> dict[str, Any]:
    mean, se = mean_and_se(effect)
    low, high = (mean - 1.96 * se).item(), (mean + 1.96 * se).item()
    interval, n_draws = "test records", 0
    if label in samples:
        spread = resampled_means(samples[label], seed=seed)
        low, high = centred_interval(spread, mean.item())  # the draws are measured on fewer records
        interval, n_draws = "building + test records", len(samples[label])
    tokens = _random_tokens(samples)
    at_least = None
    if tokens is not None:
        at_least = (samples[tokens].mean(-1) >= effect[:n_part].mean()).float().mean().item()
    return {
        "vector": label,
        "effect": mean.item(),
        "se": se.item(),
        "low": low,
        "high": high,
        "interval": interval,
        "n_draws": n_draws,
        "n": len(effect),
        "p_random_tokens": at_least,
    }


def _control_row(label: str, sample: Float[Tensor, "draw record"]) -> dict[str, Any]:
    means = sample.mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return {
        "vector": label,
        "effect": means.mean().item(),
        "se": mean_and_se(means)[1].item(),
        "low": low,
        "high": high,
        "interval": "draws",
        "n_draws": len(means),
        "n": sample.shape[1],
        "p_random_tokens": None,
    }
