"""What steering does to generated text: prompts beside step sizes, with what changed and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import pandas as pd
import torch

from grains_tl._util import html
from grains_tl._util.checks import finite, listed
from grains_tl._util.progress import progress_bar
from grains_tl.evaluate.quality import text_quality
from grains_tl.inference.batches import batch_of, by_token_budget
from grains_tl.inference.generation import generate
from grains_tl.inference.logprobs import hooks_for
from grains_tl.inference.objectives import kl_divergence, token_logprobs
from grains_tl.models.running import forward_logits
from grains_tl.records.pairs import plain_text, prompt_list
from grains_tl.tokens.prompts import tokenize_responses
from grains_tl.tokens.text import texts_after
from grains_tl.types import HookedModel, Text
from grains_tl.vectors.steering import Steering

#: Behind words that the unsteered text does not have.
_MARK = html.tint(1.0, 2.0)


@dataclass(frozen=True)
class Generations:
    """Texts of every prompt at every step size; shown as a table in a notebook.

    Attributes:
        table: one row per prompt and alpha: ``prompt``, ``alpha`` (0 is the unsteered text), ``text``, ``changed`` (share
            of its words that the unsteered text does not have in their place), ``logprob_change`` (mean over its tokens of
            log p with steering minus log p without, nats), ``kl`` (mean KL(steered || base) of the next token along the
            text, nats per token), ``repetition`` and ``degenerate`` (see ``text_quality``).
        label: the steering, without its step.

    Examples:
        >>> found = compare_generations(model, vectors.steering(0.2, 12), ["The film was"], [0.1, 0.3])   # doctest: +SKIP
        >>> found.table.pivot(index="prompt", columns="alpha", values="kl")                              # doctest: +SKIP
    """

    table: pd.DataFrame
    label: str

    def _repr_html_(self) -> str:
        alphas = list(dict.fromkeys(self.table["alpha"]))
        rows = []
        for _, group in self.table.groupby("prompt_number", sort=False):
            of_alpha: dict[float, Any] = {row.alpha: row for row in group.itertuples()}
            base = of_alpha[0.0].text
            cells = [_cell(of_alpha[alpha], base) for alpha in alphas]
            rows.append([html.text(group["prompt"].iloc[0], longest=200), *cells])
        heads = ["prompt", *("unsteered" if a == 0 else f"alpha {html.number(a, '+g')}" for a in alphas)]
        style = "vertical-align:top;min-width:14em"
        table = html.table(heads, rows, styles=[[style.partition(";")[0], *[style] * len(alphas)] for _ in rows])
        about = "Tinted words differ from the unsteered text; log p and KL in nats per token."
        return html.frame(html.title("Generations", self.label), table, html.note(about))


def compare_generations(
    model: HookedModel,
    steering: Steering,
    prompts: Text | Iterable[Text],
    alphas: Sequence[float],
    *,
    max_new_tokens: int = 40,
) -> Generations:
    """Greedy continuations of some prompts under several step sizes, next to the unsteered ones.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: from ``vectors.steering``; its own ``alpha`` is replaced by each of ``alphas``.
        prompts: texts or conversations, or one of them.
        alphas: step sizes; 0 is always among them.
        max_new_tokens: of each continuation.

    Returns:
        ``Generations``; ``table`` has one row per prompt and alpha, in nats and shares.

    Raises:
        ValueError: no prompts or alphas, something else than a ``Steering``, or what ``generate`` refuses.

    Examples:
        >>> compare_generations(model, vectors.steering(0.2, 12), ["The film was"], [-0.2, 0.2])   # doctest: +SKIP
    """
    if not isinstance(steering, Steering):
        raise ValueError(f"steering is a {type(steering).__name__}; expected vectors.steering(alpha, layers)")
    if steering.operator == "clamp":
        raise ValueError("operator='clamp' with alpha 0 is no unsteered text; use another operator, or generate twice")
    asked, steps = prompt_list(prompts), [finite("alpha", alpha) for alpha in listed("alphas", alphas)]
    if not steps:
        raise ValueError("no alphas; give at least one, for example alphas=[-0.2, 0.2]")
    parts: list[pd.DataFrame] = []
    with progress_bar(total=(len({0.0, *steps})) * len(asked), desc="generate", unit="text") as bar:
        for alpha in dict.fromkeys([0.0, *steps]):
            step = replace(steering, alpha=alpha)
            texts = generate(model, asked, step, max_new_tokens=max_new_tokens)
            base = texts if not parts else list(parts[0]["text"])
            part = pd.DataFrame({"prompt_number": range(len(asked)), "prompt": [plain_text(p) for p in asked]})
            part = part.assign(
                alpha=alpha, text=texts, changed=[_share_changed(b, t) for b, t in zip(base, texts, strict=True)]
            )
            along = token_changes(model, step, asked, texts)
            part[["logprob_change", "kl"]] = [[one["change"].mean(), one["kl"].mean()] for one in along]
            parts.append(pd.concat([part, text_quality(texts)[["repetition", "degenerate"]]], axis=1))
            bar.update(len(asked))
    table = pd.concat(parts).sort_values(["prompt_number", "alpha"], kind="stable", ignore_index=True)
    return Generations(table, replace(steering, alpha=0.0).label.replace(", alpha +0", ""))


def token_changes(
    model: HookedModel, steering: Steering, prompts: Sequence[Text], texts: Sequence[str]
) -> list[pd.DataFrame]:
    """What steering does to the probability of every token of some continuations.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        steering: the step.
        prompts: one per text.
        texts: continuations, from this model or not.

    Returns:
        One table per text with a row per token: ``token`` (what it adds to the text), ``change`` (log p with steering minus
        log p without) and ``kl`` (KL(steered || base) of the distribution it is drawn from), both in nats. Empty for an
        empty text.
    """
    out = [pd.DataFrame({"token": pd.Series(dtype=object), "change": [], "kl": []}) for _ in texts]
    scored = [i for i, text in enumerate(texts) if text.strip()]
    split = {i: tokenize_responses(model, prompts[i], [texts[i]]) for i in scored}
    whole = {i: [*ids, *answer] for i, (ids, (answer,)) in split.items()}
    with torch.no_grad():
        for group in by_token_budget([len(whole[i]) for i in scored]):
            members = [scored[place] for place in group]
            starts = [len(split[i][0]) for i in members]
            targets = [
                (row, p - 1, whole[i][p], 1.0, row)
                for row, (i, start) in enumerate(zip(members, starts, strict=True))
                for p in range(start, len(whole[i]))
            ]
            batch = batch_of(
                model, [whole[i][:-1] for i in members], range(len(members)), starts, targets, len(members)
            )
            base, changed = (
                forward_logits(model, batch.ids, batch.attention_mask, batch.keep, hooks)[
                    batch.target_row, batch.target_keep
                ].float()
                for hooks in (None, hooks_for(steering, batch))
            )
            gain = token_logprobs(changed, batch.target_id) - token_logprobs(base, batch.target_id)
            kl = kl_divergence(changed.log_softmax(-1), base.log_softmax(-1))
            for row, (i, start) in enumerate(zip(members, starts, strict=True)):
                own = batch.target_row == row
                shown = texts_after(model.tokenizer, whole[i][:start], whole[i][start:])
                out[i] = pd.DataFrame({"token": shown, "change": gain[own].tolist(), "kl": kl[own].tolist()})
    return out


def _changed_words(base: str, text: str) -> list[tuple[str, bool]]:
    """The words of ``text``, and whether each is new beside ``base``."""
    old, new = base.split(), text.split()
    same = [False] * len(new)
    for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
        same[block.b : block.b + block.size] = [True] * block.size
    return [(word, not kept) for word, kept in zip(new, same, strict=True)]


def _share_changed(base: str, text: str) -> float:
    words = _changed_words(base, text)
    return sum(new for _, new in words) / len(words) if words else float(bool(base.split()))


def marked_words(base: str, text: str) -> str:
    """A text as HTML, with a tint on the words that ``base`` does not have in their place."""
    words = _changed_words(base, text)
    return " ".join(html.element("span", html.text(word), _MARK) if new else html.text(word) for word, new in words)


def _cell(row: Any, base: str) -> str:
    figures = f"repetition {html.percent(row.repetition)}"
    if row.alpha:
        figures = f"log p {html.signed(row.logprob_change)}, KL {html.number(row.kl)}, {figures}"
    return marked_words(base, row.text) + html.note(figures)
