"""What a tokenizer puts around a text: BOS, EOS, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grains_tl.models.state import require_hooked_model
from grains_tl.tokens.images import template_owner
from grains_tl.types import HookedModel


@dataclass(frozen=True)
class TokenRules:
    """What was decided about a tokenizer.

    Attributes:
        bos: the declared BOS id, if it is put before plain-text prompts, else ``None``.
        eos: end-of-text / end-of-turn id, the replacement of tokens masked with ``"eos"`` (as in GrAInS for LLMs).
        pad: id under padding; the attention mask hides it, so any id will do where there is no pad token.
        special: ids that are never content.
        n_ctx: longest sequence the model takes.
        has_chat_template: whether conversational prompts can be rendered.
        front: ids put before plain-text prompts: what the tokenizer's own call puts there (most often BOS or nothing), BOS
            left out where the model's ``cfg.default_prepend_bos`` is off, as in ``model.to_tokens``. Chat templates write
            their own markers, nothing is added to them.
        back: ids that the tokenizer's own call puts behind a text; left out, because a response follows.

    Examples:
        >>> token_rules(model).describe()     # doctest: +SKIP
        'no BOS added; pad id 2, padded right and masked; end id 2; context 8192; chat template present'
    """

    bos: int | None
    eos: int
    pad: int
    special: frozenset[int]
    n_ctx: int
    has_chat_template: bool
    front: tuple[int, ...] = ()
    back: tuple[int, ...] = ()

    def describe(self) -> str:
        """One line for a human."""
        if self.front == () or (self.bos == self.front[0] and len(self.front) == 1):
            front = "no BOS added" if self.bos is None else f"BOS id {self.bos} added to plain-text prompts"
        else:
            front = f"ids {list(self.front)} put before plain-text prompts, as the tokenizer does"
        back = f"; its closing ids {list(self.back)} left out" if self.back else ""
        chat = "chat template present" if self.has_chat_template else "no chat template"
        return f"{front}{back}; pad id {self.pad}, padded right and masked; end id {self.eos}; context {self.n_ctx}; {chat}"


def token_rules(model: HookedModel) -> TokenRules:
    """Decide BOS, padding and special tokens for a model once.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.

    Returns:
        The rules; ``rules.describe()`` puts them into words.

    Raises:
        ValueError: the model has no tokenizer.

    Examples:
        >>> token_rules(model).describe()  # doctest: +SKIP
        'no BOS added; pad id 2, padded right and masked; end id 2; context 8192; chat template present'
    """
    require_hooked_model(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer (or model.set_tokenizer) first")
    bos = tokenizer.bos_token_id
    # TransformerLens may have given the tokenizer special tokens that the embedding has no row for
    known = range(int(model.cfg.d_vocab))
    special = {int(i) for i in tokenizer.all_special_ids if i in known}
    front, back = _around(tokenizer)
    has_bos = front[:1] == (bos,)
    if has_bos and getattr(model.cfg, "default_prepend_bos", None) is False:
        has_bos, front = False, front[1:]
    candidates = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, bos) if i in known]
    fallback = candidates[0] if candidates else 0
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in known else fallback
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id in known else fallback
    return TokenRules(
        bos=int(bos) if has_bos else None,
        eos=int(eos),
        pad=int(pad),
        special=frozenset({*special, *front}),
        n_ctx=int(model.cfg.n_ctx),
        has_chat_template=getattr(template_owner(model), "chat_template", None) is not None,
        front=front,
        back=back,
    )


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer's own call puts before and behind the ids of a text."""
    for text in ("a", "the", "0"):  # the first of them that the tokenizer has ids for
        whole, bare = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False))
        for n in range(len(whole) - len(bare) + 1) if bare else ():
            if whole[n : n + len(bare)] == bare:
                return tuple(whole[:n]), tuple(whole[n + len(bare) :])
    return (), ()
