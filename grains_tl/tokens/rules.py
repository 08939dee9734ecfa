"""What a tokenizer puts around a text: BOS, EOS, padding."""

from __future__ import annotations

from dataclasses import dataclass

from grains_tl.models.loading import adds_bos
from grains_tl.tokens.images import template_owner
from grains_tl.types import HookedModel


@dataclass(frozen=True)
class TokenRules:
    """What was decided about a tokenizer.

    Attributes:
        bos: id put before plain-text prompts, or ``None``: added if the tokenizer itself adds it, unless the model's
            ``cfg.default_prepend_bos`` is off, as in ``model.to_tokens``. Chat templates write their own markers, nothing
            is added to them.
        eos: end-of-text / end-of-turn id, the replacement of tokens masked with ``"eos"`` (as in GrAInS for LLMs).
        pad: id under padding; the attention mask hides it, so any id will do where there is no pad token.
        special: ids that are never content.
        n_ctx: longest sequence the model takes.
        has_chat_template: whether conversational prompts can be rendered.

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

    def describe(self) -> str:
        """One line for a human."""
        bos = "no BOS added" if self.bos is None else f"BOS id {self.bos} added to plain-text prompts"
        chat = "chat template present" if self.has_chat_template else "no chat template"
        return f"{bos}; pad id {self.pad}, padded right and masked; end id {self.eos}; context {self.n_ctx}; {chat}"


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
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer (or model.set_tokenizer) first")
    bos = tokenizer.bos_token_id
    # TransformerLens may have given the tokenizer special tokens that the embedding has no row for
    known = range(int(model.cfg.d_vocab))
    special = {int(i) for i in tokenizer.all_special_ids if i in known}
    has_bos = adds_bos(tokenizer) and getattr(model.cfg, "default_prepend_bos", None) is not False
    candidates = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, bos) if i in known]
    fallback = candidates[0] if candidates else 0
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in known else fallback
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id in known else fallback
    return TokenRules(
        bos=int(bos) if has_bos else None,
        eos=int(eos),
        pad=int(pad),
        special=frozenset(special),
        n_ctx=int(model.cfg.n_ctx),
        has_chat_template=getattr(template_owner(model), "chat_template", None) is not None,
    )
