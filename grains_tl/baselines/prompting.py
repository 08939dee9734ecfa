"""Prompting as a baseline: an instruction in front of every record, measured with the same margins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from grains_tl.records.loading import preference_pairs
from grains_tl.records.pairs import PairLike, PreferencePair


def with_system_prompt(pairs: Iterable[PairLike], instruction: str, *, separator: str = "\n\n") -> list[PreferencePair]:
    r"""The same records with an instruction in front of each prompt: a strong baseline (AxBench, arXiv 2501.17148).

    Conversations get it as their system message, in front of one they already have; a text prompt as its first
    paragraph. Responses are untouched, so every metric of the package applies: compare
    ``score_pairs(model, tokenize_pairs(model, with_system_prompt(pairs, text)))`` with the plain records, or, as the
    effects of vectors are, half the difference between an instruction and its opposite.

    Args:
        pairs: the test records.
        instruction: what the model is told.
        separator: between the instruction and what follows it in one text.

    Returns:
        The records with changed prompts, in their order.

    Raises:
        ValueError: an empty instruction.

    Examples:
        >>> pair = PreferencePair(prompt="Dinner was", chosen=" great", rejected=" awful")
        >>> with_system_prompt([pair], "Be kind.")[0].prompt
        'Be kind.\n\nDinner was'
        >>> chat = PreferencePair(prompt=[{"role": "user", "content": "Hi"}], chosen="great", rejected="awful")
        >>> with_system_prompt([chat], "Be kind.")[0].prompt[0]
        {'role': 'system', 'content': 'Be kind.'}
    """
    if not instruction.strip():
        raise ValueError(f"instruction={instruction!r} is empty; say what the model is to be told")

    def rewritten(pair: PreferencePair) -> PreferencePair:
        if isinstance(pair.prompt, str):
            return replace(pair, prompt=instruction + separator + pair.prompt)
        first, *rest = pair.prompt
        if first.get("role") == "system":
            own = first["content"]
            parts = [{"type": "text", "text": instruction + separator}]
            joined = instruction + separator + own if isinstance(own, str) else [*parts, *own]
            return replace(pair, prompt=[{**first, "content": joined}, *rest])
        return replace(pair, prompt=[{"role": "system", "content": instruction}, *pair.prompt])

    return [rewritten(pair) for pair in preference_pairs(pairs)]
