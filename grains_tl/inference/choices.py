"""Questions with several answers: their likelihoods, and MC1, MC2 and binary accuracy from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import numbered
from grains_tl._util.progress import progress_bar
from grains_tl.inference.batches import Batch, batch_of, by_token_budget
from grains_tl.inference.logprobs import HooksForBatch, batch_logprobs, hooks_for
from grains_tl.records.choices import MultipleChoice
from grains_tl.tokens.prompts import tokenize_responses
from grains_tl.types import HookedModel


@dataclass(frozen=True)
class TokenizedChoices:
    """A question as token ids; one border for all choices, so that their comparison is right.

    Attributes:
        prompt: ids up to the border.
        choices: ids of each choice after the border.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """Input rows without repeats, and the row that scores each choice.

        An input that is the beginning of another needs no row of its own: letters share a single one.
        """
        inputs = [self.prompt + choice[:-1] for choice in self.choices]
        rows: list[tuple[int, ...]] = []
        for ids in sorted(inputs, key=len, reverse=True):
            if not any(row[: len(ids)] == ids for row in rows):
                rows.append(ids)
        return tuple(rows), tuple(next(i for i, row in enumerate(rows) if row[: len(ids)] == ids) for ids in inputs)


def tokenize_choices(model: HookedModel, items: Iterable[MultipleChoice]) -> list[TokenizedChoices]:
    """Tokenize questions and check them against the model, all before anything runs.

    Raises:
        ValueError: no questions, one too long for the context, or a choice without tokens; the message names the
            question (from 1).
    """
    tokenized = []
    for number, item in enumerate(items, start=1):
        with numbered("question", number):
            tokenized.append(TokenizedChoices(*tokenize_responses(model, item.prompt, item.choices)))
    if not tokenized:
        raise ValueError("no questions; expected at least one MultipleChoice")
    return tokenized


def choice_batches(
    model: HookedModel,
    tokenized: Sequence[TokenizedChoices],
) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
    """Length-bucketed batches, with the (question, choice) that each scored slot belongs to.

    The batches go through ``batch_logprobs`` and ``prepare_restart`` as those of preference pairs do: slot ``i`` of
    ``batch_logprobs(...).flatten()`` is the ``i``-th entry of the list (one slot at the end may be spare).
    """
    per_item = [item.rows for item in tokenized]
    groups = by_token_budget([len(rows[0]) for rows, _ in per_item], [len(rows) for rows, _ in per_item])
    for group in groups:
        slots: list[tuple[int, int]] = []
        rows: list[tuple[int, ...]] = []
        owner: list[int] = []
        targets: list[tuple[int, int, int, float, int]] = []
        for place, i in enumerate(group):
            item, (item_rows, row_of) = tokenized[i], per_item[i]
            for c, choice in enumerate(item.choices):
                row, start = len(rows) + row_of[c], len(item.prompt) - 1
                targets += [(row, start + t, token, 1.0, len(slots)) for t, token in enumerate(choice)]
                slots.append((i, c))
            rows += item_rows
            owner += [place] * len(item_rows)
        prompt_lens = [len(tokenized[group[o]].prompt) for o in owner]
        yield slots, batch_of(model, rows, owner, prompt_lens, targets, (len(slots) + 1) // 2)


def score_choices(
    model: HookedModel,
    items: Iterable[MultipleChoice] | Sequence[TokenizedChoices],
    fwd_hooks: HooksForBatch | None = None,
) -> Float[Tensor, "item choice"]:
    """Log-likelihood of every choice given its prompt, nats.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        items: questions, or what ``tokenize_choices`` made of them.
        fwd_hooks: a ``Steering``, hooks, or a function ``Batch -> hooks``.

    Returns:
        ``[item, choice]`` on the CPU, summed over the tokens of a choice; ``-inf`` where a question has fewer choices
        than the longest.

    Raises:
        ValueError: from ``tokenize_choices``, or items of another kind; before anything runs.

    Examples:
        >>> scores = score_choices(model, items, vectors.hooks(0.2, [12]))   # doctest: +SKIP
        >>> mc1(scores, items).mean(), mc2(scores, items).mean()             # doctest: +SKIP
    """
    given = list(items)
    questions = [item for item in given if isinstance(item, MultipleChoice)]
    ready = [item for item in given if isinstance(item, TokenizedChoices)]
    if max(len(questions), len(ready)) < len(given):  # some would be left out without a word
        raise ValueError(
            f"items are {sorted({type(item).__name__ for item in given})}; expected MultipleChoice questions only, or only "
            "results of tokenize_choices"
        )
    tokenized = ready or tokenize_choices(model, questions)
    out = torch.full((len(tokenized), max(len(t.choices) for t in tokenized)), -torch.inf)
    with torch.no_grad(), progress_bar(total=len(tokenized), desc="score", unit="question") as bar:
        for slots, batch in choice_batches(model, tokenized):
            hooks = hooks_for(fwd_hooks, batch)
            logprobs = batch_logprobs(model, batch, hooks).flatten().cpu()
            where = torch.tensor(slots)
            out[where[:, 0], where[:, 1]] = logprobs[: len(slots)].float()
            bar.update(len(where[:, 0].unique()))
    return out


def mc1(scores: Float[Tensor, "item choice"], items: Sequence[MultipleChoice]) -> Float[Tensor, "item"]:
    r"""1 where the best right choice is likelier than every wrong one, else 0 (TruthfulQA, arXiv 2109.07958, MC1).

    Other right choices do not count, on either side. The mean over questions is the score.

    Args:
        scores: ``[item, choice]``, nats, from ``score_choices``.
        items: the questions.

    Returns:
        ``[item]``, 0 or 1.

    Examples:
        >>> item = MultipleChoice("Q: 2 + 2?\nA:", (" 4", " four", " 5"), (True, True, False))
        >>> mc1(torch.tensor([[-2.0, -9.0, -3.0]]), [item])
        tensor([1.])
    """
    return _each(scores, items, lambda s, item: float(s[item.best] > s[~_right(item)].max()))


def mc2(scores: Float[Tensor, "item choice"], items: Sequence[MultipleChoice]) -> Float[Tensor, "item"]:
    r"""Share of the probability of all choices that the right ones hold (TruthfulQA, arXiv 2109.07958, MC2), 0 to 1.

    Args:
        scores: ``[item, choice]``, nats, from ``score_choices``.
        items: the questions.

    Returns:
        ``[item]``, share from 0 to 1.

    Examples:
        >>> item = MultipleChoice("Q: 2 + 2?\nA:", (" 4", " four", " 5"), (True, True, False))
        >>> mc2(torch.zeros(1, 3), [item])
        tensor([0.6667])
    """
    return _each(scores, items, lambda s, item: s.softmax(0)[_right(item)].sum().item())


def binary_accuracy(scores: Float[Tensor, "item choice"], items: Sequence[MultipleChoice]) -> Float[Tensor, "item"]:
    """1 where the best right choice is likelier than the first wrong one, else 0: the two that ``pair`` takes.

    Args:
        scores: ``[item, choice]``, nats, from ``score_choices``.
        items: the questions.

    Returns:
        ``[item]``, 0 or 1.

    Examples:
        >>> item = MultipleChoice("2 + 2 =", (" 4", " 5", " 3"), (True, False, False))
        >>> binary_accuracy(torch.tensor([[-2.0, -3.0, -1.0]]), [item])
        tensor([1.])
    """
    return _each(scores, items, lambda s, item: float(s[item.best] > s[item.wrong]))


def _right(item: MultipleChoice) -> Tensor:
    return torch.tensor(item.labels)


def _each(
    scores: Tensor, items: Sequence[MultipleChoice], function: Callable[[Tensor, MultipleChoice], float]
) -> Tensor:
    """A number per question, from its own choices without the padding."""
    widest = max((len(item.choices) for item in items), default=0)
    if len(scores) != len(items) or scores.shape[-1] < widest:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} for {len(items)} questions of up to {widest} choices; give the "
            "questions that were scored, in their order"
        )
    rows = [(s[: len(item.choices)].double(), item) for s, item in zip(scores, items, strict=True)]
    broken = [i for i, (s, _) in enumerate(rows, start=1) if not bool(s.isfinite().all())]
    if broken:
        raise ValueError(f"question {broken[0]} has NaN or infinite scores; check the hooks and the model")
    return torch.tensor([function(s, item) for s, item in rows])
