"""From logits to the contrastive objective. Pure functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

#: How a response's token log-probabilities become one number: their sum, their mean, or the first token that differs.
Objective = Literal["sum", "mean", "single"]


def margins(logprobs: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
    """log p(chosen) - log p(rejected), nats."""
    return logprobs[..., 0] - logprobs[..., 1]


def require_objective(objective: str) -> None:
    """Refuse anything that is not an ``Objective`` (ValueError)."""
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r}; expected one of {get_args(Objective)}")


def token_logprobs(logits: Float[Tensor, "*shape vocab"], targets: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log p(target) at each position, nats, computed in float32.

    Examples:
        >>> import torch
        >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).item()  # log(1/4)
        -1.3862943649291992
    """
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def kl_divergence(
    steered: Float[Tensor, "*shape vocab"], base: Float[Tensor, "*shape vocab"]
) -> Float[Tensor, "*shape"]:
    """KL(steered || base) at each position, nats, from log-probabilities (``log_softmax`` of float32 logits).

    Examples:
        >>> import torch
        >>> round(kl_divergence(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()).item(), 4)
        0.3681
    """
    return (steered.exp() * (steered - base)).sum(-1)


def token_weights(
    chosen: Sequence[int], rejected: Sequence[int], objective: Objective
) -> tuple[list[float], list[float]]:
    """The weight of every response token in the objective, for both responses.

    ``"sum"``: 1 each (GrAInS, arXiv 2507.18043, with the whole response rather than its last token). ``"mean"``: one
    over the response's length. ``"single"``: 1 at the first token where the two responses differ, 0 elsewhere.
    """
    require_objective(objective)
    if objective == "sum":
        return [1.0] * len(chosen), [1.0] * len(rejected)
    if objective == "mean":
        return [1.0 / len(chosen)] * len(chosen), [1.0 / len(rejected)] * len(rejected)
    shorter = min(len(chosen), len(rejected))
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if first is None:
        raise ValueError(
            "objective='single' needs a token in which the responses differ, and one response is the beginning "
            "of the other; use 'sum' or 'mean'"
        )
    return [float(i == first) for i in range(len(chosen))], [float(i == first) for i in range(len(rejected))]
