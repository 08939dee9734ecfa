"""Choosing tokens by their scores: the ones that push towards chosen, and those that push towards rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grains_tl.attribution.result import Attribution


@dataclass(frozen=True)
class Selection:
    """Positions of the chosen tokens in one prompt, strongest first.

    Examples:
        >>> Selection(toward_chosen=(4, 7), toward_rejected=(2,)).toward_chosen
        (4, 7)
    """

    toward_chosen: tuple[int, ...]
    toward_rejected: tuple[int, ...]


def select_tokens(
    attribution: Attribution, top_k: int, top_k_image: int | None = None, *, spare_end: bool = False
) -> Selection:
    """The ``top_k`` content tokens with the largest positive score, and with the most negative one.

    Fewer come back where fewer have that sign (arXiv 2507.18043, section 3: I+ and I-). Special and template tokens are
    never chosen.

    Args:
        attribution: scores of one record.
        top_k: tokens on each side; with ``top_k_image`` text tokens alone (0 for none).
        top_k_image: patches on each side, chosen apart from the text; ``None`` lets both compete for ``top_k``.
        spare_end: never choose the prompt's last token, where ``readout="prompt_end"`` reads the residual: masking it
            replaces what is read. Notebook 03 shows what that does.

    Returns:
        ``Selection``: token positions on each side, the largest score first.

    Raises:
        ValueError: nothing to choose (``top_k`` and ``top_k_image`` not positive).

    Examples:
        >>> a = Attribution(torch.tensor([.5, -1., 2.]), ["a", "b", "c"], torch.tensor([True] * 3),
        ...                 torch.tensor([False] * 3), None, 1.5, None, "leave_one_out")
        >>> select_tokens(a, top_k=1)
        Selection(toward_chosen=(2,), toward_rejected=(1,))
    """
    check_budget(top_k, top_k_image)
    scores = torch.where(attribution.content, attribution.scores.nan_to_num(0.0), torch.zeros(()))
    if spare_end:
        scores = torch.cat([scores[:-1], torch.zeros(1)])
    order = scores.argsort(descending=True, stable=True).tolist()
    up = _first([i for i in order if scores[i] > 0], attribution.is_image, top_k, top_k_image)
    down = _first([i for i in reversed(order) if scores[i] < 0], attribution.is_image, top_k, top_k_image)
    return Selection(tuple(up), tuple(down))


def check_budget(top_k: int, top_k_image: int | None = None) -> None:
    """Refuse numbers that choose nothing (ValueError)."""
    if top_k_image is None and top_k < 1:
        raise ValueError(f"top_k={top_k}; expected at least 1")
    if top_k_image is not None and (min(top_k, top_k_image) < 0 or top_k + top_k_image < 1):
        raise ValueError(
            f"top_k={top_k}, top_k_image={top_k_image}; expected numbers from 0 on, at least one of them above 0"
        )


def _first(order: list[int], is_image: Tensor, top_k: int, top_k_image: int | None) -> list[int]:
    if top_k_image is None:
        return order[:top_k]
    text = [i for i in order if not is_image[i]][:top_k]
    patches = [i for i in order if is_image[i]][:top_k_image]
    return [i for i in order if i in {*text, *patches}]


def random_selection(
    content: Sequence[bool], like: Selection, generator: torch.Generator, is_image: Sequence[bool] | None = None
) -> Selection:
    """As many content tokens as ``like`` has, drawn at random (the two sides may overlap only if they must).

    With ``is_image`` as many text tokens and as many patches, each drawn among its kind.
    """
    if is_image is not None and any(is_image):
        drawn = []
        for kind in (False, True):
            of_kind = [c and i == kind for c, i in zip(content, is_image, strict=True)]
            sides = (
                tuple(p for p in side if is_image[p] == kind) for side in (like.toward_chosen, like.toward_rejected)
            )
            drawn.append(random_selection(of_kind, Selection(*sides), generator))
        text, patches = drawn
        return Selection(text.toward_chosen + patches.toward_chosen, text.toward_rejected + patches.toward_rejected)
    positions = torch.tensor([i for i, keep in enumerate(content) if keep])
    order = positions[torch.randperm(len(positions), generator=generator)].tolist()
    n_up, n_down = len(like.toward_chosen), len(like.toward_rejected)
    doubled = order + order  # enough even if the two sides together ask for more than there is
    return Selection(tuple(doubled[:n_up]), tuple(doubled[n_up : n_up + n_down]))
