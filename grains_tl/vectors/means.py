"""Where two classes of texts lie along steering vectors: what the operator ``"match"`` moves residuals to.

1. Read the residuals of the records' responses, every response as the mean over its tokens.
2. Take their component along the unit direction of each layer, and average it over the records of a class.
3. ``"match"`` with a positive alpha moves each component the share alpha of the way to the mean of chosen; with a negative
   one the share |alpha| of the way to the mean of rejected. With alpha 1 the class means coincide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of
from grains_tl.tokens.pairs import Records, as_tokenized
from grains_tl.types import HookedModel
from grains_tl.vectors.directions import LayerDirections
from grains_tl.vectors.readout import read_out

#: A subclass gives its own kind back.
Own = TypeVar("Own", bound="LayerDirections")


class WithMeans:
    """What lets ``SteeringVectors`` be used with ``operator="match"``."""

    def with_means(self: Own, model: HookedModel, pairs: Records) -> Own:  # type: ignore[misc]
        """The same vectors with the mean component of chosen and of rejected responses, for ``operator="match"``.

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            pairs: records whose responses are the two classes; those the vectors were built from will do.

        Returns:
            Vectors with ``means`` in their manifest, which ``save`` keeps: by layer, the mean component of rejected and of
            chosen responses, in residual units.

        Raises:
            ValueError: no records, or vectors that do not fit the model.

        Examples:
            >>> vectors.with_means(model, pairs).steering(0.5, 12, operator="match")      # doctest: +SKIP
        """
        cast("Any", self).require_match(model)
        tokenized = as_tokenized(model, pairs)
        if not tokenized:
            raise OptionError("no records; give those whose responses are the two classes")
        means = []
        for side in ("rejected", "chosen"):
            own = [replace(t, chosen=getattr(t, side), rejected=getattr(t, side)) for t in tokenized]
            found = read_out(model, own, layers=list(self.layers), readout="response_mean", site=self.site).mean(0)
            means.append((found * self.directions.float().cpu()).sum(-1).tolist())
        entry = {
            str(layer): {"rejected": low, "chosen": high, "of": _name_of(direction)}
            for layer, low, high, direction in zip(self.layers, *means, self.directions, strict=True)
        }
        return replace(self, info={**self.info, "means": entry})


def target_of(vectors: LayerDirections, layer: int, alpha: float) -> float:
    """The component that ``"match"`` moves to at a layer: the mean of chosen, for a negative alpha that of rejected.

    Raises:
        OptionError: vectors that do not say where the classes lie, or whose directions have changed since.
    """
    means = vectors.info.get("means")
    entry = means.get(str(layer)) if isinstance(means, Mapping) else None
    direction = vectors.directions[vectors.layers.index(layer)]
    if not isinstance(entry, Mapping) or entry.get("of") != _name_of(direction):
        problem = (
            "do not say where the two classes lie" if entry is None else "changed since the class means were measured"
        )
        raise OptionError(
            f"operator='match' moves residuals to a class mean, and the vectors at layer {layer} {problem}; measure it: "
            "vectors.with_means(model, pairs)"
        )
    return float(entry["chosen" if alpha > 0 else "rejected"])


def _name_of(direction: Tensor) -> str:
    return hash_of([round(x, 3) for x in direction.detach().to("cpu", torch.float32).tolist()])
