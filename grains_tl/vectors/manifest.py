"""What a file of vectors says about how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from grains_tl._util.files import short_hash
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.store import image_key
from grains_tl.models.identity import model_identity
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel


def manifest(
    model: HookedModel,
    tokenized: Sequence[TokenizedPair],
    settings: dict[str, Any],
    attributions: Sequence[Attribution] = (),
) -> dict[str, Any]:
    """What goes into ``SteeringVectors.info``: model, settings, token rules, template hash, data hash, gaps, versions."""
    template = getattr(model.tokenizer, "chat_template", None) or ""
    gaps = [a.relative_gap for a in attributions if a.relative_gap is not None]
    identity = model_identity(model, bare=True)
    shape = {key: identity[key] for key in ("n_layers", "d_model", "n_heads", "d_vocab")}
    return {
        "model": {**identity, "config_hash": short_hash(shape)},
        **settings,
        "n_records": len(tokenized),
        "data_hash": short_hash([[t.prompt, t.chosen, t.rejected, *image_key(t)] for t in tokenized]),
        "moved_borders": sum(t.moved_border > 0 for t in tokenized),
        "token_rules": token_rules(model).describe(),
        "template_hash": short_hash(str(template)),
        "median_relative_gap": float(torch.tensor(gaps).median()) if gaps else None,
        "converged_share": sum(bool(a.converged) for a in attributions) / len(gaps) if gaps else None,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions that go into manifests and reports."""
    names = ("grains-tl", "transformer-lens", "transformers", "torch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def texts_used(info: Mapping[str, Any]) -> frozenset[str]:
    """Hashes (``hash_of`` of the token ids) of the neutral texts that went into vectors, from their ``info``.

    Examples:
        >>> sorted(texts_used({"neutral_texts": ["a"], "fisher": {"texts": ["b"]}}))
        ['a', 'b']
    """
    fisher = info.get("fisher")
    from_fisher = fisher.get("texts", ()) if isinstance(fisher, Mapping) else ()
    return frozenset([*info.get("neutral_texts", ()), *from_fisher])
