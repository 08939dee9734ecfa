"""Steering some positions more than others: a strength for every position of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl._util.checks import finite
from grains_tl._util.errors import OptionError
from grains_tl._util.files import short_hash

#: Token ids of a prompt, and the digest of its images behind them if it has some (``inference.batches.prompt_key``).
PromptKey = tuple[int | str, ...]

#: Weights of known prompts, by their ``PromptKey``.
ByPrompt = Mapping[Any, Sequence[float]]


@dataclass(frozen=True, eq=False)
class Weighted:
    """Weights of positions, given as ``positions`` of a steering: each multiplies the amount of the step there.

    Attributes:
        weights: ``[batch, pos]`` numbers for the prompts of one batch, padding included; or a mapping from the token ids of
            prompts to their weights, which ``attribution.prompt_weights`` makes and which serves any batch of these
            prompts; or a function of the activation ``[batch, pos, d_model]`` before the step that gives ``[batch, pos]``.
        after: the weight of all positions behind the prompt (a function sees these too).
        name: of the weights, for tables; a function's results can only be resumed from a checkpoint if it has one.

    Raises:
        ValueError: weights of another kind or shape, or that are not finite.

    Examples:
        >>> twice = Weighted(torch.tensor([[0.0, 2.0, 1.0]]), after=0.0)
        >>> hooks = vectors.steering(0.2, 12, positions=twice).for_prompt(3)                      # doctest: +SKIP
    """

    weights: Float[Tensor, "batch pos"] | ByPrompt | Callable[[Tensor], Tensor]
    after: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", finite("after", self.after))
        if isinstance(self.weights, Tensor):
            if self.weights.ndim != 2 or not bool(torch.isfinite(self.weights.float()).all()):
                raise OptionError(f"weights of shape {tuple(self.weights.shape)}; expected finite numbers [batch, pos]")
        elif isinstance(self.weights, Mapping):
            if not self.weights:
                raise OptionError("weights of no prompt; expected a mapping from token ids to weights")
            for ids, own in self.weights.items():
                if _n_tokens(ids) != len(own) or not bool(torch.isfinite(torch.tensor([float(w) for w in own])).all()):
                    raise OptionError(
                        f"{len(own)} weights for a prompt of {_n_tokens(ids)} tokens; expected one finite number each"
                    )
        elif not callable(self.weights):
            raise OptionError(
                f"weights are a {type(self.weights).__name__}; expected a [batch, pos] tensor, a mapping from token ids to "
                "weights, or a function of the activation"
            )

    @property
    def needs_ids(self) -> bool:
        """Whether the prompts of a batch have to be known."""
        return isinstance(self.weights, Mapping)

    @property
    def by_function(self) -> bool:
        """Whether a function of the activation gives the weights."""
        return not isinstance(self.weights, (Tensor, Mapping))

    @property
    def key(self) -> str:
        """What tells it apart in a checkpoint; empty for a function without a name."""
        if isinstance(self.weights, Tensor):
            return short_hash(["tensor", self.weights.tolist(), self.after])
        if isinstance(self.weights, Mapping):
            rows = sorted([short_hash(list(ids)), [float(w) for w in own]] for ids, own in self.weights.items())
            return short_hash(["prompts", rows, self.after])
        return short_hash(["function", self.name, self.after]) if self.name else ""

    def of_batch(
        self, prompt_len: int | Int[Tensor, "batch"] | None, prompts: Sequence[PromptKey] | None
    ) -> Callable[[Tensor], Float[Tensor, "rows pos"]]:
        """From an activation to the weight of each of its positions, float64 on the CPU.

        Args:
            prompt_len: where the prompts end, padding in front included; ``None`` where a run over several positions is one.
            prompts: each row's prompt.

        Returns:
            ``activation [batch, pos, d_model] -> [rows, pos]``.
        """
        if self.by_function:
            return self._of_function
        if isinstance(self.weights, Mapping):
            return self._of_prompts(self.weights, prompt_len, prompts)
        assert isinstance(self.weights, Tensor)
        given = self.weights.double().cpu()
        return lambda act: self._placed(given, act)

    def _of_function(self, act: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        assert callable(self.weights)
        found = self.weights(act)
        if not isinstance(found, Tensor) or found.shape != act.shape[:2] or not bool(torch.isfinite(found).all()):
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the weights' function gave {kind} for activations {tuple(act.shape)}; expected [batch, pos]"
            )
        return found.detach().cpu().double()

    def _of_prompts(self, known: ByPrompt, prompt_len: Any, prompts: Sequence[PromptKey] | None) -> Any:
        if prompts is None or prompt_len is None:

            def unknown(act: Tensor) -> Tensor:
                raise ValueError(
                    "these weights belong to prompts, and which prompts run is not known here; give the steering itself to "
                    "generate, score_pairs or a sweep, or steering.for_prompt(prompt_len, prompts=[token ids of each row])"
                )

            return unknown
        ends = torch.as_tensor(prompt_len).cpu().reshape(-1).expand(len(prompts)).tolist()
        rows = torch.full((len(prompts), max(ends)), self.after, dtype=torch.float64)
        for row, (ids, end) in enumerate(zip(prompts, ends, strict=True)):
            own, n = known.get(tuple(ids)), _n_tokens(ids)
            if own is None:
                raise ValueError(
                    f"no weights for prompt {row + 1} of this batch ({n} tokens); there are weights of {len(known)} "
                    "prompts: make them for these prompts too (attribution.prompt_weights)"
                )
            rows[row, end - n : end] = torch.tensor([float(w) for w in own], dtype=torch.float64)
        return lambda act: self._placed(rows, act)

    def _placed(self, rows: Float[Tensor, "rows given"], act: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The weights at the positions of a run; those behind the prompt have ``after``."""
        batch, n_pos = act.shape[:2]
        if n_pos == 1 and rows.shape[1] != 1:  # a decoded token
            return torch.full((1, 1), self.after, dtype=torch.float64)
        if rows.shape[0] not in (1, batch) or rows.shape[1] > n_pos:
            raise ValueError(f"weights of shape {tuple(rows.shape)} do not fit activations {tuple(act.shape)}")
        return torch.nn.functional.pad(rows, (0, n_pos - rows.shape[1]), value=self.after)


def _n_tokens(prompt: PromptKey) -> int:
    return len(prompt) - (bool(prompt) and isinstance(prompt[-1], str))
