"""One cell of a sweep: which vector, layer, alpha, operator and scope, and the hooks that carry it out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grains_tl._util.checks import finite, listed
from grains_tl.hooks.gate_run import GateRun
from grains_tl.hooks.operators import Operator
from grains_tl.hooks.steer import Positions
from grains_tl.hooks.weights import Weighted
from grains_tl.inference.logprobs import HooksForBatch
from grains_tl.models.running import listed_hooks, require_hook_names, stream_after
from grains_tl.types import FwdHooks, HookedModel, PromptHooks
from grains_tl.vectors.combined import CombinedSteering
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

Vectors = SteeringVectors | Mapping[str, SteeringVectors]


@dataclass(frozen=True)
class Setting:
    """One thing to measure.

    Attributes:
        layer: the lowest layer the hooks act on; everything below is shared with the unsteered run (a ``Steering`` of
            another site acts inside its block, which is then run as well).
        hooks: a ``Steering``, or hooks on ``resid_post`` of this and later layers, or a function ``Batch -> hooks``. An
            empty list is the unsteered model and costs nothing.
        vector: the vector's name in a table.
        alpha: the step size, for the table.
        positions: the scope, for the table.
        draw: number of a resampled or random vector, from 0; -1 for the vector itself.
        key: tells in a checkpoint what the hooks do (empty: cannot be resumed).

    Examples:
        >>> Setting(layer=12, hooks=[], vector="unsteered", alpha=0.0).vector
        'unsteered'
    """

    layer: int
    hooks: HooksForBatch
    vector: str = "vector"
    alpha: float = math.nan
    positions: str = "all"
    draw: int = -1
    key: str = ""

    @property
    def read_layers(self) -> list[int]:
        """Layers that a gate reads and nothing changes, which may lie below ``layer``."""
        if callable(self.hooks):
            return []
        made = self.hooks.for_prompt(None) if isinstance(self.hooks, PromptHooks) else listed_hooks(self.hooks)
        return sorted({fn.gate.layer for _, fn in made if isinstance(fn, GateRun)})

    @property
    def start(self) -> int:
        """The layer whose residual is taken from the unsteered run; -1: the stream before block 0."""
        if not isinstance(self.hooks, (Steering, CombinedSteering)):
            return self.layer
        return min(min(part.layers) - (part.vectors.site != "resid_post") for part in self.hooks.parts)

    @classmethod
    def of(cls, steering: Steering | CombinedSteering, *, vector: str | None = None, draw: int = -1) -> Setting:
        """A setting that applies some steering.

        Args:
            steering: from ``vectors.steering(alpha, layers)``, or a sum of such, which has no single alpha (NaN).
            vector: its name in a table; default the method that the vectors were built with.
            draw: number of a resampled or random vector.

        Returns:
            The setting, with the steering's resume key.
        """
        methods = [str(part.vectors.info.get("method", "vector")) for part in steering.parts]
        scopes = {_scope_name(part.positions) for part in steering.parts}
        return cls(
            min(steering.layers),
            [] if steering.idle else steering,
            vector=" + ".join(methods) if vector is None else vector,
            alpha=steering.alpha if isinstance(steering, Steering) else math.nan,
            positions=scopes.pop() if len(scopes) == 1 else "mixed",
            draw=draw,
            key=steering.key,
        )


def _scope_name(positions: Any) -> str:
    if isinstance(positions, Weighted):
        return positions.name or "weighted"
    return positions if isinstance(positions, str) else "mask"


def require_settings(model: HookedModel, settings: Sequence[Setting | Steering | CombinedSteering]) -> list[Setting]:
    """The settings as a list; a ``Steering`` among them becomes a ``Setting``.

    Hooks that are made for each batch are looked at when they are there.

    Raises:
        KeyError: a hook that the model lacks.
        ValueError: something else than settings, such as hooks or one setting alone, or hooks that would never run.
    """
    wanted = (
        "a list is needed: grid(vectors, layers, alphas), [vectors.steering(alpha, layer)] or [Setting(layer, hooks)]"
    )
    if isinstance(settings, (Setting, Steering, CombinedSteering, SteeringVectors)) or not hasattr(
        settings, "__iter__"
    ):
        raise ValueError(f"settings are one {type(settings).__name__}; {wanted}")
    ready = []
    for number, given in enumerate(settings, start=1):
        setting = Setting.of(given) if isinstance(given, (Steering, CombinedSteering)) else given
        if not isinstance(setting, Setting):
            raise ValueError(f"setting {number} is a {type(setting).__name__}; {wanted}")
        ready.append(setting)
    for setting in ready:
        if not callable(setting.hooks):
            made = setting.hooks.for_prompt(None) if isinstance(setting.hooks, PromptHooks) else setting.hooks
            hooks = listed_hooks(made)
            require_hook_names(model, hooks)
            _require_reach(setting.start, hooks)
    return ready


def _require_reach(layer: int, fwd_hooks: FwdHooks) -> None:
    """Blocks up to ``layer`` are not run again: a hook in one of them would be left out without a word.

    The reading hook of a gate is not: it is given the cached residual of its layer.
    """
    for name in (name for name, fn in fwd_hooks if not isinstance(fn, GateRun)):
        found = re.match(r"blocks\.(\d+)\.", str(name))
        place = int(found[1]) if found else layer + 1 if str(name).startswith(("ln_final", "unembed")) else -1
        if place < layer or (place == layer and name != stream_after(layer)):
            raise ValueError(
                f"a setting of layer {layer} has a hook on {name}, which would never run: all up to "
                f"{stream_after(layer)} is taken from the unsteered run. Give the lowest layer that the hooks act on, one "
                "less for hooks inside it"
            )


def grid(
    vectors: Vectors,
    layers: int | Sequence[int] | None = None,
    alphas: Sequence[float] = (-0.2, 0.2),
    *,
    operator: Operator = "add_renorm",
    positions: Positions | Sequence[Positions] = "all",
    draws: Mapping[str, Sequence[SteeringVectors]] | None = None,
) -> list[Setting]:
    """Settings for every vector, scope, layer and alpha, for ``record_effects`` and ``text_costs``.

    Args:
        vectors: one, or several by name.
        layers: one or several; default all that a vector has.
        alphas: step sizes, fractions of the layer's typical residual norm.
        operator: how the step is applied (see ``SteeringVectors.hooks``).
        positions: one scope, or several to compare (see ``SteeringVectors.hooks``).
        draws: by name, resampled versions of a vector (``bootstrap_vectors``) or draws of a control.

    Returns:
        One ``Setting`` per vector, draw, scope, layer and alpha.

    Raises:
        ValueError: nothing to measure, an option that ``SteeringVectors.hooks`` refuses, or a layer that is not stored.

    Examples:
        >>> import torch
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0))
        >>> [(s.layer, s.alpha) for s in grid({"v": v}, alphas=[0.1, 0.2])]
        [(4, 0.1), (4, 0.2), (5, 0.1), (5, 0.2)]
    """
    steps = list(dict.fromkeys(finite("alpha", alpha) for alpha in listed("alphas", alphas)))
    scopes = [positions] if isinstance(positions, str) else list(positions)
    members = [(name, -1, one) for name, one in named_vectors(vectors).items()]
    members += [(name, i, one) for name, several in (draws or {}).items() for i, one in enumerate(several)]
    settings = [
        Setting.of(one.steering(alpha, layer, operator=operator, positions=scope), vector=name, draw=draw)
        for name, draw, one in members
        for scope in scopes
        for layer in sorted(set(one.layer_list(layers)))
        for alpha in steps
    ]
    if not settings:
        raise ValueError("nothing to measure; give vectors, layers, scopes and alphas, for example alphas=[-0.2, 0.2]")
    return settings


def named_vectors(vectors: Vectors) -> Mapping[str, SteeringVectors]:
    """Vectors by name; a single one goes by the method it was built with."""
    return {str(vectors.info.get("method", "vector")): vectors} if isinstance(vectors, SteeringVectors) else vectors
