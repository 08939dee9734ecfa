"""Answers to is-there questions (POPE, arXiv 2305.10355), and preferences between two responses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.stats import standard_error


@dataclass(frozen=True)
class YesNoScores:
    """Scores of one set of is-there questions; "yes" is the positive class.

    Attributes:
        n: number of questions.
        accuracy: share of right answers.
        accuracy_se: its standard error.
        balanced_accuracy: mean of the shares right among true yes and among true no.
        balanced_accuracy_se: its standard error.
        precision: share of right answers among those answered yes; NaN where none is.
        recall: share answered yes among the questions whose answer is yes; NaN where none is.
        f1: harmonic mean of precision and recall, for yes.
        yes_rate: share answered yes.
        false_yes: share answered yes among the questions whose answer is no.
        false_yes_se: its standard error.
        auc: area under the ROC curve of the margins: 0.5 is chance, and no shift of the threshold changes it. NaN
            without margins, or where all answers are the same.

    Examples:
        >>> yes_no_scores([True, False], said=[True, True]).false_yes
        1.0
    """

    n: int
    accuracy: float
    accuracy_se: float
    balanced_accuracy: float
    balanced_accuracy_se: float
    precision: float
    recall: float
    f1: float
    yes_rate: float
    false_yes: float
    false_yes_se: float
    auc: float


def yes_no_scores(
    truth: Sequence[bool], said: Sequence[bool] | None = None, margins: Sequence[float] | None = None
) -> YesNoScores:
    """Score answers, or margins between "yes" and "no", or both.

    Args:
        truth: whether the answer is yes.
        said: whether the model said yes; by default ``margin > 0``.
        margins: log p(yes) - log p(no), nats.

    Returns:
        ``YesNoScores``: shares between 0 and 1, and standard errors.

    Raises:
        ValueError: nothing to score, lengths that differ, margins that are not finite.

    Examples:
        >>> s = yes_no_scores([True, True, False, False], margins=[2.0, -1.0, 1.0, -3.0])
        >>> s.accuracy, s.recall, s.yes_rate, s.auc
        (0.5, 0.5, 0.5, 0.75)
    """
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    y = np.asarray(truth, dtype=bool)
    if said is None and margins is None:
        raise ValueError("neither answers nor margins given; pass said=, margins=, or both")
    m = None if margins is None else np.asarray(margins, dtype=float)
    if m is not None and not np.isfinite(m).all():
        raise ValueError(
            "some margins are NaN or infinite, so the model gave broken log-probabilities for those questions; "
            "check its dtype"
        )
    yes: Any = np.asarray(said, dtype=bool) if said is not None else np.asarray(margins, dtype=float) > 0
    if not len(y) or len(yes) != len(y) or (m is not None and len(m) != len(y)):
        margin_count = "no" if m is None else len(m)
        raise ValueError(f"{len(y)} true answers, {len(yes)} given ones, {margin_count} margins; expected one each")
    precision, recall, f1, _ = precision_recall_fscore_support(y, yes, average="binary", zero_division=np.nan)
    right = (yes == y).astype(float)
    sides = [right[y], right[~y]]
    both = all(len(side) for side in sides)
    false_yes = yes[~y].astype(float)
    return YesNoScores(
        n=len(y),
        accuracy=float(right.mean()),
        accuracy_se=standard_error(right),
        balanced_accuracy=float(np.mean([s.mean() for s in sides])) if both else math.nan,
        balanced_accuracy_se=0.5 * math.hypot(*(standard_error(s) for s in sides)) if both else math.nan,
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
        yes_rate=float(yes.mean()),
        false_yes=float(false_yes.mean()) if len(false_yes) else math.nan,
        false_yes_se=standard_error(false_yes),
        auc=float(roc_auc_score(y, m)) if m is not None and both else math.nan,
    )


def yes_no_table(
    splits: Sequence[str],
    truth: Sequence[bool],
    said: Sequence[bool] | None = None,
    margins: Sequence[float] | None = None,
) -> pd.DataFrame:
    """``yes_no_scores`` per split (random, popular, adversarial, ...), one row each, in the order they appear.

    Args:
        splits: name of the split of each question.
        truth: whether the answer is yes.
        said: whether the model said yes; by default ``margin > 0``.
        margins: log p(yes) - log p(no), nats.

    Returns:
        One row per split: ``split`` and the fields of ``YesNoScores``.

    Examples:
        >>> table = yes_no_table(["random"] * 2 + ["popular"] * 2, [True, False] * 2, said=[True, False, True, True])
        >>> table[["split", "accuracy"]].values.tolist()
        [['random', 1.0], ['popular', 0.5]]
    """
    rows = []
    for split in dict.fromkeys(splits):
        at = [i for i, s in enumerate(splits) if s == split]
        part: list[Any] = [None if x is None else [x[i] for i in at] for x in (said, margins)]
        rows.append({"split": split, **asdict(yes_no_scores([truth[i] for i in at], part[0], part[1]))})
    return pd.DataFrame(rows)


def read_yes_no(answer: str) -> bool:
    """An answer in words as yes or no, by POPE's rule: no if the first sentence has "no" or "not", else yes.

    Args:
        answer: the model's answer.

    Returns:
        ``True`` for yes.

    Examples:
        >>> [read_yes_no(a) for a in ("Yes, there is.", "No.", "There is not. Yes", "A dog")]
        [True, False, False, True]
    """
    words = re.findall(r"[a-z]+", answer.split(".")[0].lower().replace("n't", " not"))
    return not {"no", "not"} & set(words)


def preference_win_rate(logprobs: Float[Tensor, "record 2"]) -> tuple[float, float]:
    """Share of records whose chosen response is the likelier one (ties count half), and its standard error.

    This is the preference accuracy of SPA-VL pairs. Published win rates are something else: there a judge compares two
    models' answers; ``judge_answers`` is the tool for that.

    Args:
        logprobs: ``[record, 2]``, chosen and rejected, nats, as ``score_pairs`` gives them.

    Returns:
        ``(share, standard error)``.

    Raises:
        ValueError: no records.

    Examples:
        >>> import torch
        >>> preference_win_rate(torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]))
        (0.5, 0.5)
    """
    if not len(logprobs):
        raise ValueError("no records; expected at least one preference pair")
    wins = ((logprobs[:, 0] - logprobs[:, 1]).sign().double() / 2 + 0.5).cpu().numpy()
    return float(wins.mean()), standard_error(wins)
