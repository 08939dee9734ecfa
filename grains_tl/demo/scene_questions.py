"""Is-there questions: where the false yes comes from, and whether steering does more than shift a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.stats import standard_error
from grains_tl.attribution.api import attribute_all
from grains_tl.attribution.result import Attribution
from grains_tl.demo.scene_records import yes_no_questions
from grains_tl.demo.scene_skills import answer_logprobs, yes_margins
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.hooks.mask import Mask, Masker
from grains_tl.hooks.stand_ins import hide, replacements
from grains_tl.inference.logprobs import batch_logprobs, score_batches
from grains_tl.inference.objectives import margins
from grains_tl.models._scene_grid import patches_of
from grains_tl.models._scenes import partner
from grains_tl.models.tiny_vlm import question_text
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import TokenizedPair, tokenize_pairs
from grains_tl.types import FwdHooks, HookedModel

#: Position of the first image token in a prompt (after BOS).
FIRST_PATCH = 1


def question_margins(
    model: HookedModel, questions: Sequence[YesNoQuestion], fwd_hooks: FwdHooks | None = None
) -> Float[Tensor, "question"]:
    """log p(yes) - log p(no) of each question, nats."""
    texts = [question_text(q.question) for q in questions]
    return yes_margins(answer_logprobs(model, texts, [q.image for q in questions], fwd_hooks), model)


def false_yes_questions(model: HookedModel, n: int, *, seed: int = 0) -> list[YesNoQuestion]:
    """Adversarial test questions that the model wrongly answers with yes.

    Raises:
        ValueError: too few of them.
    """
    asked = [q for q in yes_no_questions("test", 3 * n, seed=seed) if q.split == "adversarial" and not q.answer]
    wrong = [q for q, m in zip(asked, question_margins(model, asked).tolist(), strict=True) if m > 0]
    if len(wrong) < n:
        raise ValueError(f"{len(asked)} adversarial questions gave {len(wrong)} false yes, {n} are wanted")
    return wrong[:n]


def yes_attributions(
    model: HookedModel,
    questions: Sequence[YesNoQuestion],
    method: str = "leave_one_out",
    *,
    n_steps: int = 32,
    mask: Mask | Masker = "mean_embedding",
) -> list[Attribution]:
    """Attribution of log p(yes) - log p(no): positive scores speak for yes."""
    return attribute_all(
        model,
        tokenize_pairs(model, _yes_pairs(questions)),
        method=method,
        n_steps=n_steps,
        mask=mask,
    )


def _yes_pairs(questions: Sequence[YesNoQuestion]) -> list[PreferencePair]:
    return [PreferencePair(question_text(q.question), " yes", " no", image=q.image) for q in questions]


def cell_scores(
    attributions: Sequence[Attribution], *, positive: bool, first_patch: int = FIRST_PATCH
) -> Float[Tensor, "question cell"]:
    """Sum of the scores (or of the positive ones) over each cell's four patches, nats."""
    scores = torch.stack([a.scores[first_patch : first_patch + 16].nan_to_num(0.0) for a in attributions])
    scores = scores.clamp(min=0) if positive else scores
    return torch.stack([scores[:, list(patches_of(cell))].sum(-1) for cell in range(4)], dim=1)


def occlusion(
    model: HookedModel, questions: Sequence[YesNoQuestion], *, mask: Mask | Masker = "mean_embedding"
) -> Float[Tensor, "question cell"]:
    """How far log p(yes) - log p(no) falls when a cell's four patches are taken out together, nats."""
    return fall_by_cell(model, tokenize_pairs(model, _yes_pairs(questions)), mask, FIRST_PATCH)


def fall_by_cell(
    model: HookedModel, tokenized: Sequence[TokenizedPair], mask: Mask | Masker, first_patch: int
) -> Float[Tensor, "record cell"]:
    """How far each record's margin falls when a cell's four patches are taken out together, nats.

    Args:
        model: the bridge.
        tokenized: records with one picture of 16 patches each.
        mask: what stands in for the patches.
        first_patch: position of the first image token in every prompt.
    """
    stand_ins = replacements(model, tokenized, mask)
    out = torch.zeros(len(tokenized), 4)
    with torch.no_grad():
        for group, batch in score_batches(model, tokenized):
            owner = [group[i] for i in batch.record.tolist()]
            base = margins(batch_logprobs(model, batch))
            for cell in range(4):
                gone = [[first_patch + p for p in patches_of(cell)]] * len(owner)
                hooks = hide(model, stand_ins, owner, gone, offset=batch.offset, like=batch.ids)
                out[group, cell] = (base - margins(batch_logprobs(model, batch, hooks))).cpu()
    return out


def partner_share(
    model: HookedModel, questions: Sequence[YesNoQuestion], attributions: Sequence[Attribution]
) -> dict[str, Any]:
    """How much of the support for a false yes lies on the patches of the partner digit, beside occlusion.

    Args:
        model: the bridge.
        questions: from ``false_yes_questions``.
        attributions: of these, from ``yes_attributions``.

    Returns:
        ``share`` of the positive scores that lies on the partner's cell and its ``se`` over questions; ``of_image`` the
        same among image tokens only (chance: 0.25); ``occlusion_largest``: how often taking the partner's cell out lowers
        the margin more than any other cell; ``agreement``: mean correlation over questions between the cells' scores
        and occlusion; ``median_relative_gap``; ``n``.
    """
    cells = [q.meta["cells"][q.meta["digits"].index(partner(q.meta["digit"]))] for q in questions]
    rows = torch.arange(len(questions))
    support = cell_scores(attributions, positive=True)
    total = torch.stack([a.scores.nan_to_num(0.0).clamp(min=0).sum() for a in attributions])
    share = (support[rows, cells] / total.clamp(min=1e-9)).double().numpy()
    of_image = (support[rows, cells] / support.sum(-1).clamp(min=1e-9)).double().numpy()
    fall = occlusion(model, questions)
    signed = cell_scores(attributions, positive=False)
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(signed.numpy(), fall.numpy(), strict=True)]
    gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
    return {
        "share": float(share.mean()),
        "se": standard_error(share),
        "of_image": float(of_image.mean()),
        "of_image_se": standard_error(of_image),
        "occlusion_largest": float((fall.argmax(-1) == torch.tensor(cells)).double().mean()),
        "agreement": float(np.nanmean(agreement)),
        "median_relative_gap": float(np.median(gaps)) if gaps else None,
        "n": len(questions),
    }
