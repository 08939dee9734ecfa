"""The vocabulary: what a model must offer, what a hook is, what a preference record is.

Axis names used in every shape: ``batch`` (rows of a forward pass), ``pos`` (token positions), ``d_model`` (residual
width), ``layer`` (counted from 0), ``record`` (preference records), ``vocab``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

#: A hook function ``fn(act, hook)``; returns the new activation, or ``None`` to leave it as it is.
HookFn = Callable[..., Any]
#: What ``run_with_hooks(fwd_hooks=...)`` and ``model.hooks(fwd_hooks=...)`` take.
FwdHooks = list[tuple[str, HookFn]]
#: One chat message: ``{"role": ..., "content": ...}``; the content is text, or a list of parts (``{"type": "image"}``,
#: ``{"type": "text", "text": ...}``) as vision-language models take them.
Message = Mapping[str, Any]
#: A prompt or response: plain text, or a conversation that goes through the model's chat template.
Text = str | Sequence[Message]


@runtime_checkable
class HookedModel(Protocol):
    """What the package needs of a model: a ``TransformerBridge`` or a ``HookedTransformer`` has all of it."""

    cfg: Any
    tokenizer: Any
    blocks: Any

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class PreferencePair:
    """One preference record in the TRL format.

    Attributes:
        prompt: text, or a list of ``{"role", "content"}`` messages (rendered with the model's chat template).
        chosen: the preferred response; text continues a text prompt as it stands (mind the leading space), messages
            (or plain text) answer a conversational prompt.
        rejected: the dispreferred response, likewise.
        image: for vision-language models: a PIL image, a path, an array ``[height, width, 3]``, or a list of these. The
            prompt may say where it stands (the processor's placeholder, or an image part of a message); it comes first
            otherwise.
        meta: any further columns of the source row (domain, split, ...).

    Raises:
        ValueError: a field is empty, or ``chosen`` equals ``rejected``.

    Example:
        >>> pair = PreferencePair(prompt="The soup was cold. Dinner was", chosen=" great", rejected=" awful")
        >>> pair.chosen
        ' great'
    """

    prompt: Text
    chosen: Text
    rejected: Text
    image: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            require_text(name, value)
            if plain_text(value).strip() == "":
                raise ValueError(f"{name} is empty ({value!r}); a preference record needs some text in it")
        if self.chosen == self.rejected:
            raise ValueError(
                f"chosen equals rejected ({plain_text(self.chosen)!r}); there is nothing to prefer, drop the record"
            )
        if isinstance(self.prompt, str) and not (isinstance(self.chosen, str) and isinstance(self.rejected, str)):
            raise ValueError(
                "a text prompt needs text responses; write the prompt as messages too if the responses are messages"
            )


@dataclass(frozen=True, eq=False)
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

    Example:
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
        top = ", ".join(f"{self.tokens[i]!r} {self.scores[i]:+.2f}" for i in order)
        gap = "none" if self.gap is None else f"{self.gap:+.2f} nats"
        return f"{self.method}: f(x) = {self.objective:+.2f} nats, gap {gap}; largest: {top}"


def preference_pairs(pairs: Iterable[Any]) -> list[PreferencePair]:
    """The records as a list.

    Raises:
        ValueError: something else than records, such as one record alone, a path or rows that were not read.
    """
    if isinstance(pairs, (PreferencePair, str, PathLike, Mapping)) or not hasattr(pairs, "__iter__"):
        raise ValueError(
            f"records are a {type(pairs).__name__}; a list of PreferencePair is needed: load_pairs(...), or [pair] for one"
        )
    records = list(pairs)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, PreferencePair):
            raise ValueError(
                f"record {number} is a {type(record).__name__}; a PreferencePair is needed: load_pairs reads mappings"
            )
    return records


def require_text(name: str, value: Any) -> None:
    """Refuse what is neither text nor a conversation (ValueError)."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; text or a list of messages is needed")
    wanted = 'a list of messages {"role": ..., "content": text or a list of parts} is needed'
    for message in () if isinstance(value, str) else value:
        content = message.get("content", "") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
            raise ValueError(f"{name} has {message!r} in it; {wanted}")


def plain_text(text: Text) -> str:
    """The words of a text or conversation, without template markers."""
    if isinstance(text, str):
        return text
    return "\n".join(words for message in text for words in message_texts(message))


def message_texts(message: Message) -> list[str]:
    """The texts of a message, one per text part."""
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        return [str(part.get("text", "")) for part in content if part.get("type") == "text"]
    return [str(content)]
