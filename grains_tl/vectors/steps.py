"""What other engines can do of a steering: the vector that is added at each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl.hooks.operators import UNITLESS, Operator
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors


def steps(
    vectors: SteeringVectors, alpha: float, layers: Sequence[int] | None = None, *, operator: Operator = "add"
) -> dict[int, Float[Tensor, "d_model"]]:
    """What ``operator="add"`` adds to the residual stream: ``alpha * resid_norm * direction`` per layer.

    Args:
        vectors: from ``build_vectors``.
        alpha: fraction of the layer's typical residual norm.
        layers: at which of the stored layers; may be left out if there is only one.
        operator: what you steer with; anything but ``"add"`` is refused.

    Raises:
        ValueError: another operator or site, several stored layers and none named, a layer that is not stored, a bad
            ``alpha``.

    Examples:
        >>> import torch
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> steps(v, 0.2, [5])
        {5: tensor([ 0., 10.])}
    """
    residual_stream_only("an export", vectors.site)
    if operator != "add":
        raise ValueError(
            f"operator={operator!r} cannot be exported: other engines only add a vector. Check that your effect "
            "survives operator='add' (the norm is not restored then), and export that; gr.finding.as_add finds its alpha"
        )
    if alpha == 0 or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}; expected a finite number other than 0")
    if layers is None and len(vectors.layers) > 1:
        raise ValueError(f"name the layers to steer: layers=[...]; stored are {list(vectors.layers)}")
    part = vectors.at(vectors.layers if layers is None else list(layers))
    part.steering(alpha, part.layers, operator=operator)  # refuses vectors that do not know the residual norms
    return {layer: alpha * part.resid_norms[i] * part.directions[i] for i, layer in enumerate(part.layers)}


def amounts(steering: Steering, operators: Sequence[Operator], engine: str) -> dict[int, tuple[Tensor, float]]:
    """Direction and amount at each layer of a steering that an engine can do as it is.

    Args:
        steering: what was chosen.
        operators: those that the engine knows.
        engine: its name, for messages.

    Returns:
        By layer: the unit direction ``[d_model]``, float32 on the CPU, and the amount as ``steer_hook`` takes it.

    Raises:
        OptionError: another operator, positions other than all, a gate, a step that does nothing.
    """
    if not isinstance(steering, Steering):
        raise OptionError(
            f"expected a Steering, got {type(steering).__name__}; make one with vectors.steering(alpha, layers)"
        )
    residual_stream_only(engine, steering.vectors.site)
    if steering.operator not in operators:
        known = " or ".join(repr(one) for one in operators)
        hint = "; gr.finding.as_add finds the 'add' of the same KL" if steering.operator == "add_renorm" else ""
        raise OptionError(f"{engine} cannot do operator {steering.operator!r}, only {known}{hint}")
    if steering.gate is not None or steering.positions != "all":
        raise OptionError(f"{engine} steers every position of every run; the steering is {steering.label}")
    if steering.idle:
        raise OptionError(f"the steering changes nothing ({steering.label}); expected an alpha other than 0")
    vectors, found = steering.vectors, {}
    units = vectors.resid_norms if steering.scale == "residual" else vectors.magnitudes
    for layer in steering.layers:
        row = vectors.layers.index(layer)
        unit = 1.0 if steering.operator in UNITLESS else float(units[row])
        direction = vectors.directions[row].float().cpu()
        if bool(direction.any()):
            found[layer] = (direction / direction.norm(), steering.alpha * unit)
    return found
