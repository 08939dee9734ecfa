"""Do the patches of the object that is asked for carry the answer? Attribution beside the removal of each cell."""

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
from grains_tl.demo.object_scenes import CAPTION_PROMPT, object_margins, object_questions, object_scenes
from grains_tl.demo.scene_questions import cell_scores, fall_by_cell
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.hooks.mask import Mask
from grains_tl.models._object_scenes import OBJECTS, partner, with_article
from grains_tl.models.scenes_vlm import chat_text
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.pairs import tokenize_pairs

#: Position of the first image token in a prompt.
FIRST_PATCH = 3
MASK = Mask("mean_embedding", "mean_patch")
METHODS = ("leave_one_out", "gradient_x_input", "integrated_gradients")
N, N_SCENES = 8, 40

#: Pairs, and of each the cell that is expected to carry its margin.
Records = tuple[list[PreferencePair], list[int]]


def attribution_study(model: Any, n: int = N) -> dict[str, Any]:
    """Shares of the margin's support on the expected cell, for three kinds of records on test scenes."""
    questions = object_questions("test", N_SCENES)
    asked = [q for q in questions if q.split == "adversarial"]
    says = dict(zip(map(id, asked), (object_margins(model, asked) > 0).tolist(), strict=True))
    kinds = {
        "true yes, cell of the object": _about([q for q in asked if q.answer and says[id(q)]][:n], partners=False),
        "false yes, cell of the partner": _about([q for q in asked if not q.answer and says[id(q)]][:n], partners=True),
        "first object of the true caption, its cell": _first_objects(n),
    }
    figures: dict[str, Any] = {}
    for kind, (pairs, cells) in kinds.items():
        if len(pairs) < 5:
            figures[kind] = {"n": len(pairs), "note": f"too few in {N_SCENES} scenes"}
            continue
        tokenized = tokenize_pairs(model, pairs)
        fall = fall_by_cell(model, tokenized, MASK, FIRST_PATCH)
        matters = fall.argmax(-1) == torch.tensor(cells)
        figures[kind] = {"n": len(pairs), "its removal lowers the margin most": float(matters.double().mean())}
        for method in METHODS:
            figures[kind][method] = _figures(attribute_all(model, tokenized, method=method, mask=MASK), fall, cells)
        print(kind, figures[kind], flush=True)
    return figures


def _about(questions: Sequence[YesNoQuestion], *, partners: bool) -> Records:
    pairs = [PreferencePair(chat_text(q.question), "Yes", "No", image=q.image) for q in questions]
    wanted = [partner(q.meta["object"]) if partners else q.meta["object"] for q in questions]
    return pairs, [q.meta["cells"][q.meta["objects"].index(i)] for q, i in zip(questions, wanted, strict=True)]


def _first_objects(n: int) -> Records:
    """The true caption's first object against an absent one that is not its partner and has the same article."""
    rng, pairs, cells = np.random.default_rng(9), [], []
    for scene, picture in zip(*object_scenes("test", n, seed=5), strict=True):
        first, shown = min(scene, key=lambda thing: thing.cell), {thing.index for thing in scene}
        article = with_article(first.name).split()[0]
        others = [i for i, name in enumerate(OBJECTS) if with_article(name).split()[0] == article]
        absent = [i for i in others if i not in shown and i != partner(first.index)]
        other = OBJECTS[int(rng.choice(absent))]
        pairs.append(
            PreferencePair(CAPTION_PROMPT + article.capitalize(), f" {first.name}", f" {other}", image=picture)
        )
        cells.append(first.cell)
    return pairs, cells


def _figures(
    attributions: Sequence[Attribution], fall: Float[Tensor, "record cell"], cells: Sequence[int]
) -> dict[str, float | None]:
    """Shares of the positive scores, and how far the cells' sums agree with removal, over records."""
    rows = torch.arange(len(cells))
    signed, positive = (cell_scores(attributions, positive=p, first_patch=FIRST_PATCH) for p in (False, True))
    total = torch.stack([a.scores.nan_to_num(0.0).clamp(min=0).sum() for a in attributions])
    share = (positive[rows, cells] / total.clamp(min=1e-9)).double().numpy()
    of_image = (positive[rows, cells] / positive.sum(-1).clamp(min=1e-9)).double().numpy()
    agreement = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(signed.numpy(), fall.numpy(), strict=True)])
    gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
    return {
        "share_of_all": round(float(share.mean()), 4),
        "share_of_all_se": round(standard_error(share), 4),
        "share_of_patches": round(float(of_image.mean()), 4),
        "share_of_patches_se": round(standard_error(of_image), 4),
        "largest_cell": round(float((signed.argmax(-1) == torch.tensor(cells)).double().mean()), 4),
        "same_cell_as_removal": round(float((signed.argmax(-1) == fall.argmax(-1)).double().mean()), 4),
        "correlation_with_removal": round(float(np.nanmean(agreement)), 4),
        "median_relative_gap": round(float(np.median(gaps)), 4) if gaps else None,
    }
