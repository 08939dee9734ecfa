"""Keys and values of prompts that have run, for rows that go on from them (transformers' key-value caches)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def empty_cache() -> Any:
    """A cache for a model to fill: pass it as ``past_key_values`` with ``use_cache=True``."""
    from transformers import DynamicCache

    return DynamicCache()


def cache_of(given: Mapping[str, Any]) -> Any:
    """The key-value cache among a call's arguments or results, ``None`` without one.

    transformers calls it ``cache`` since 5.24, and ``past_key_values`` before.
    """
    caches = (given.get(name) for name in ("cache", "past_key_values"))
    return next((found for found in caches if found is not None), None)


def require_filled(output: Mapping[str, Any]) -> None:
    """Refuse what ``generate(..., return_dict_in_generate=True)`` gave where attention did not keep its keys and values.

    Each token would then have been written without a look at the prompt. TransformerLens 4.3 does that with transformers
    5.24 and later, which hand the cache to attention under another name.

    Raises:
        RuntimeError: which versions are installed, and what to install.
    """
    layers = getattr(cache_of(output), "layers", None)
    if layers is None:  # recurrent models, caches of a model's own
        return
    kept = [bool(layer.is_initialized) for layer in layers if hasattr(layer, "keys")]
    if not layers or not all(kept):
        raise RuntimeError(
            f"attention kept no keys and values while the model wrote, so that it wrote without the prompt: TransformerLens "
            f"{metadata.version('transformer-lens')} does not work with transformers {metadata.version('transformers')}; "
            "pip install 'transformers<5.24', or a TransformerLens that knows the installed transformers"
        )


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of some prompts, as attention uses them (positions applied).

    Attributes:
        layers: of each layer the keys and values, ``[row, head, pos, d_head]``.
        row: which row holds a record's prompt.
    """

    layers: tuple[tuple[Float[Tensor, "row head pos d_key"], Float[Tensor, "row head pos d_value"]], ...]
    row: Mapping[int, int]

    @classmethod
    def of(cls, filled: Any, row: Mapping[int, int], n_rows: int, n_pos: int, n_layers: int) -> PromptCache | None:
        """What a run left in an ``empty_cache``.

        ``None`` if that is not one key and value for each token of each row in each layer: recurrent layers, sliding
        windows that dropped the beginning, models without a cache.
        """
        layers = []
        for layer in getattr(filled, "layers", ()):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
                return None
            if any(x.ndim != 4 or (x.shape[0], x.shape[2]) != (n_rows, n_pos) for x in (keys, values)):
                return None
            layers.append((keys.detach(), values.detach()))
        return cls(tuple(layers), dict(row)) if len(layers) == n_layers else None

    def rows(self, records: Sequence[int], length: int) -> Any:
        """A cache for ``past_key_values`` with the first ``length`` tokens of these records, one row each.

        For one pass: what the pass adds is given to attention and not kept.
        """
        lent = empty_cache()
        rows = torch.tensor([self.row[record] for record in records])
        lent.layers = [_layer_class()(keys, values, rows, length) for keys, values in self.layers]
        return lent


@cache
def _layer_class() -> Any:
    """The class of a layer that lends a prompt's keys and values to rows; importing transformers is slow."""
    from transformers.cache_utils import DynamicLayer

    class LentLayer(DynamicLayer):
        """Keeping every layer's keys and values until the pass is over took 4 % of the memory of a build."""

        def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, length: int) -> None:
            super().__init__()
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]  # views
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.rows = rows.to(keys.device)

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys = torch.cat([self.keys[self.rows], key_states], dim=-2)
            return keys, torch.cat([self.values[self.rows], value_states], dim=-2)

    return LentLayer
