"""Whether vectors belong to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grains_tl._util.warn import warn_caller
from grains_tl.hooks.sites import Site, site_width
from grains_tl.models.identity import model_identity, same_fingerprint
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel


def require_match(
    info: Mapping[str, Any], layers: Sequence[int], d_model: int, model: HookedModel, *, site: Site = "resid_post"
) -> None:
    """Refuse a model that vectors were not made for (``SteeringVectors.require_match``).

    Args:
        info: the vectors' manifest.
        layers: the layers they are for.
        d_model: their width.
        model: the model to be steered.
        site: the activation they are added to.

    Raises:
        ValueError: naming what differs.
    """
    made_for = info.get("model")
    have = model_identity(model, bare=True)
    if made_for is None or site != "resid_post":
        width = site_width(model, site)
        if d_model != width or max(layers) >= have["n_layers"]:
            at = "" if site == "resid_post" else f" at {site} (width {width} here)"
            raise ValueError(
                f"vectors of d_model {d_model}{at} up to layer {max(layers)} do not fit "
                f"{have['name']} (d_model {have['d_model']}, {have['n_layers']} layers)"
            )
    if made_for is None:
        return
    keys = ("d_model", "n_layers", "n_heads", "d_vocab")
    different = [f"{k}: {made_for.get(k)} -> {have[k]}" for k in keys if made_for.get(k) != have[k]]
    if not different and not same_fingerprint(made_for.get("fingerprint"), have["fingerprint"]):
        different = ["the weights (same shape, another fingerprint)"]
    if different:
        raise ValueError(
            f"these vectors were made for {made_for.get('name')}, the model is {have['name']}; different: "
            f"{'; '.join(different)}. Build vectors for this model, or load the one they belong to"
        )
    made, here = str(info.get("token_rules", "")).partition(";")[0], _bos_rule(model)
    if made and here and made != here:
        warn_caller(
            f"the vectors were built with {made}, this model's tokenizer gives {here} (TransformerLens may reload "
            "one so that it adds BOS): prompts begin with another token. gr.load_model keeps the tokenizer's own rule",
        )


def _bos_rule(model: HookedModel) -> str | None:
    return None if getattr(model, "tokenizer", None) is None else token_rules(model).describe().partition(";")[0]
