"""Attribution with its options as one dictionary, so that tests can vary them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grains_tl.attribution.methods import method_of
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.store import attribute_records as recorded


def attribute_records(model: Any, tokenized: Any, options: Mapping[str, Any], **run: Any) -> list[Attribution]:
    """``store.attribute_records`` with ``options``: method, its fields, objective and mask."""
    given = dict(options)
    shared = {name: given.pop(name) for name in ("objective", "mask") if name in given}
    return recorded(model, tokenized, method_of(given.pop("method"), **given), **shared, **run)
