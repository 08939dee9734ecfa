"""The steering that a file of vectors names."""

from __future__ import annotations

from grains_tl.hooks.reading_gates import gate_from
from grains_tl.vectors.directions import LayerDirections
from grains_tl.vectors.steering import Steering


def chosen_of(vectors: LayerDirections) -> Steering | None:
    """The choice that a manifest holds; ``None`` without one, or where its layers are not among the vectors.

    Raises:
        ValueError: an entry that cannot be meant, as from a file that was edited.
    """
    entry = vectors.info.get("chosen")
    if entry is None:
        return None
    try:
        layers = tuple(entry["layers"])
        if not set(layers) <= set(vectors.layers):
            return None
        options = {name: entry[name] for name in ("operator", "positions", "scale") if name in entry}
        gate = gate_from(vectors.info["gate"]) if entry.get("gated") else None
        return Steering(vectors, entry["alpha"], layers, gate=gate, **options)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the manifest's chosen steering {entry!r} cannot be used ({type(error).__name__}: {error}); steer with "
            "vectors.steering(alpha, layers), or save the choice again with steering.save(path)"
        ) from None
