"""The result of an attribution: one signed score per token, with what is needed to judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grains_tl._util import html
from grains_tl.attribution.display import Piece, Shown, Template, kind_of, prompt_html
from grains_tl.attribution.words import spaced


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Signed scores of the input tokens of one record.

    Attributes:
        scores: ``[pos]``, nats; positive pushes towards ``chosen``. One per prompt token.
        tokens: the prompt's tokens as text, same length.
        content: ``[pos]``, False for special tokens, BOS, chat-template tokens and row separators of images.
        is_image: ``[pos]``, True where an image feature stands; all False without an image.
        gap: completeness gap in nats, ``sum(scores) - (f(x) - f(x'))``, signed as captum's convergence delta; ``None``
            for methods that promise no completeness.
        objective: f(x) in nats, the contrastive log-likelihood of the unchanged prompt.
        baseline_objective: f(x') in nats; ``None`` for methods without a baseline run.
        method: name of the attribution method.
        spans: the patch grids of the images (``ImageSpan``), empty without an image.
        steps: gradients, or forward passes of methods without gradients, spent on this record.
        starts_word: ``[pos]``, whether a word begins at the token; ``None`` where that is not known.
        chosen: text of the preferred response; ``None`` where it is not known.
        rejected: text of the other response.
        errors: ``[pos]`` nats, an estimate of how far each score may be off, from integrated gradients with adaptive nodes
            (what their last refinement changed); ``None`` for other methods. The gap bounds no single token's error.

    Examples:
        >>> import torch
        >>> a = Attribution(torch.tensor([0.5, -1.0]), [" good", " bad"], torch.tensor([True] * 2),
        ...                 torch.tensor([False] * 2), None, 1.5, None, "leave_one_out")
        >>> print(a)
        leave_one_out: f(x) = +1.50 nats, gap none; largest: ' bad' -1.00, ' good' +0.50
    """

    scores: Tensor
    tokens: list[str]
    content: Tensor
    is_image: Tensor
    gap: float | None
    objective: float
    baseline_objective: float | None
    method: str
    spans: tuple[Any, ...] = ()
    steps: int | None = None
    starts_word: Tensor | None = None
    chosen: str | None = None
    rejected: str | None = None
    errors: Tensor | None = None

    @property
    def converged(self) -> bool | None:
        """Whether the gap is below 5 % of |f(x) - f(x')|; ``None`` where there is no gap."""
        return None if self.relative_gap is None else self.relative_gap < 0.05

    @property
    def relative_gap(self) -> float | None:
        """``|gap| / |f(x) - f(x')|``; ``None`` where there is no gap. Above 0.05 the scores have not converged."""
        if self.gap is None or self.baseline_objective is None:
            return None
        return abs(self.gap) / max(abs(self.objective - self.baseline_objective), 1e-12)

    def __str__(self) -> str:
        # what can be selected; markers of a chat template often score higher, and mean nothing
        size = self.scores.nan_to_num(0.0).abs().masked_fill(~self.content, -1.0)
        order = size.argsort(descending=True)[: min(5, int(self.content.sum()))].tolist()
        top = ", ".join(f"{self.tokens[i][:40]!r} {self.scores[i]:+.2f}" for i in order)
        gap = "none" if self.gap is None else f"{self.gap:+.2f} nats"
        return f"{self.method}: f(x) = {self.objective:+.2f} nats, gap {gap}; largest: {top}"

    def __repr__(self) -> str:
        return f"Attribution({self})"

    def _repr_html_(self) -> str:
        return self.as_html()

    def as_html(self, template: Template = "fold") -> str:
        """The prompt as text with a tint on every token; ``template`` as in ``show_tokens``."""
        texts = spaced(self.tokens, () if self.starts_word is None else self.starts_word.tolist())
        kinds = [kind_of(*flags) for flags in zip(self.content.tolist(), self.is_image.tolist(), strict=True)]
        scores = self.scores.nan_to_num(0.0).tolist()
        return prompt_html(self.shown([Piece(*one) for one in zip(texts, scores, kinds, strict=True)]), template)

    def shown(self, pieces: Sequence[Piece], about: str = "") -> Shown:
        """The prompt in pieces, with everything that is shown besides."""
        gap = "" if self.gap is None else f", completeness gap {html.signed(self.gap)} nats"
        scores = self.scores.nan_to_num(0.0)
        return Shown(
            self.method,
            f"f(x) = {html.signed(self.objective)} nats{gap}{about}",
            pieces,
            [(span, scores[span.positions]) for span in self.spans],
            None if self.chosen is None or self.rejected is None else (self.chosen, self.rejected),
        )
