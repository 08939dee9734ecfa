"""Continuations as a value: which prompts, how long, greedy or sampled, and what of their cost counts as a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grains_tl._util.checks import finite, whole
from grains_tl._util.errors import OptionError
from grains_tl.inference.generation import Continued, GenerationHooks, continue_prompts
from grains_tl.records.pairs import prompt_list
from grains_tl.types import HookedModel, Text


@dataclass(frozen=True)
class Continuations:
    """What the steered model itself writes, as the texts to measure a cost on.

    Given in place of neutral texts (``sweep(..., neutral=Continuations(prompts))``, ``text_costs``), the KL counts generated
    tokens: each setting continues the prompts, and KL(steered || base) is taken at every token of what it wrote.

    Attributes:
        prompts: texts or conversations, or one of them.
        max_new_tokens: longest continuation.
        temperature: 0 for greedy decoding, else sampling.
        n_samples: continuations of each prompt; only sampled ones differ.
        seed: of the samples.
        quantile: what counts as the KL of a continuation: its mean over tokens (``None``), or this quantile, 0.95 for
            instance, which a few tokens far off the road cannot hide behind many cheap ones.
        images: for vision-language models, one entry per prompt.

    Raises:
        ValueError: no prompts, several samples of a greedy continuation, numbers out of range.

    Examples:
        >>> Continuations("The film was", quantile=0.95).label
        '95 % quantile over generated tokens'
        >>> frame = sweep(model, vectors, pairs, neutral=Continuations(prompts, quantile=0.95))       # doctest: +SKIP
    """

    prompts: Any
    max_new_tokens: int = 40
    temperature: float = 0.0
    n_samples: int = 1
    seed: int = 0
    quantile: float | None = None
    images: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        prompts: tuple[Text, ...] = tuple(prompt_list(self.prompts))
        if not prompts:
            raise OptionError("no prompts; give at least one")
        object.__setattr__(self, "prompts", prompts)
        for name, least in (("max_new_tokens", 1), ("n_samples", 1), ("seed", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if finite("temperature", self.temperature) < 0:
            raise OptionError(f"temperature={self.temperature}; expected 0 (greedy) or a positive number")
        if self.n_samples > 1 and self.temperature == 0:
            raise OptionError(
                f"n_samples={self.n_samples} with temperature 0: greedy continuations are all alike; give a temperature, or "
                "one sample"
            )
        if self.quantile is not None and not 0 < finite("quantile", self.quantile) < 1:
            raise OptionError(f"quantile={self.quantile}; expected a share between 0 and 1, such as 0.95, or None")

    @property
    def label(self) -> str:
        """What the KL is a number of."""
        if self.quantile is None:
            return "mean over generated tokens"
        return f"{100 * self.quantile:g} % quantile over generated tokens"

    def of(self, model: HookedModel, fwd_hooks: GenerationHooks | None) -> list[list[Continued]]:
        """``[sample][prompt]`` continuations under some hooks."""
        return [
            continue_prompts(
                model,
                self.prompts,
                fwd_hooks,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed + sample,
                images=self.images,
            )
            for sample in range(self.n_samples)
        ]
