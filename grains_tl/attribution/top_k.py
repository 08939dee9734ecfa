"""How many tokens are taken from an attribution, and what counts as one: tokens, patches, words, sentences or spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl.attribution.groups import group, select_groups
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection, check_budget, select_tokens
from grains_tl.attribution.words import GroupBy, groups_of
from grains_tl.tokens.pairs import TokenizedPair


@dataclass(frozen=True)
class TopK:
    """The ``k`` tokens with the largest scores towards each response.

    Attributes:
        k: tokens on each side (the paper: 10 for long prompts, 50 with an image; 1 and 2 measured best here).
        image: patches on each side, chosen apart from ``k`` text tokens; ``None`` lets both compete for ``k``.
        group_by: count ``"word"``s, ``"sentence"``s or given spans (see ``group``) instead of tokens.
        spare_end: never choose the prompt's last token, where the residual is read by default.

    Raises:
        ValueError: numbers that choose nothing, or options that exclude each other.

    Examples:
        >>> TopK(1, group_by="word")
        TopK(k=1, image=None, group_by='word', spare_end=False)
    """

    k: int = 2
    image: int | None = None
    group_by: GroupBy | None = None
    spare_end: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole("top_k", self.k))
        if self.image is not None:
            object.__setattr__(self, "image", whole("top_k_image", self.image))
        check_budget(self.k, self.image)
        if self.group_by is not None and self.image is not None:
            raise OptionError(
                f"top_k_image={self.image} and group_by={self.group_by!r} cannot be combined; give one of them"
            )
        if self.group_by is not None and self.spare_end:
            raise OptionError(f"spare_end and group_by={self.group_by!r} cannot be combined; give one of them")

    @classmethod
    def of(cls, top_k: TopK | int) -> TopK:
        """A number of tokens as a ``TopK``."""
        return top_k if isinstance(top_k, TopK) else cls(top_k)

    def select(self, attribution: Attribution) -> Selection:
        """The positions to mask for one record."""
        if self.group_by is None:
            return select_tokens(attribution, self.k, self.image, spare_end=self.spare_end)
        return select_groups(group(attribution, by=self.group_by), self.k)

    def check(self, tokenized: Sequence[TokenizedPair]) -> None:
        """Refuse numbers that some prompt cannot give (ValueError naming the record)."""
        for number, pair in enumerate(tokenized, start=1):
            try:
                self._check(pair)
            except ValueError as error:
                raise ValueError(f"record {number}: {error}; lower top_k or drop the record") from None

    def _check(self, pair: TokenizedPair) -> None:
        if self.group_by is not None:
            groups = groups_of(pair.strings, pair.starts_word, self.group_by, pair.wordless)
            n = sum(any(pair.content[p] for p in own) for own in groups)
            if self.k > n:
                raise ValueError(f"top_k={self.k} is more than the {n} content groups of its prompt")
            return
        n_text = pair.n_content - (0 if self.image is None else pair.n_patches)
        if self.k > n_text:
            raise ValueError(f"top_k={self.k} is more than the {n_text} content tokens of its prompt")
        if (self.image or 0) > pair.n_patches:
            raise ValueError(f"top_k_image={self.image} is more than the {pair.n_patches} patches of its prompt")
