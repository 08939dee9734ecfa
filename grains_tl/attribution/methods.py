"""Every attribution method by its name. Each is a frozen value that checks itself and knows what it promises.

A name with its fields is shorthand: ``method="integrated_gradients", n_steps=64`` is ``IntegratedGradients(n_steps=64)``.
A method of one's own is a subclass of ``Method`` with ``scores``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl.attribution.gradient_methods import (
    AttentionAware,
    DiscretizedIG,
    ExpectedGradients,
    GradientXInput,
    IntegratedGradients,
    SequentialIG,
    SmoothGrad,
)
from grains_tl.attribution.method_base import Method
from grains_tl.attribution.removal_methods import LeaveKOut, LeaveOneOut

#: Every method by its short name.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LeaveOneOut,
        LeaveKOut,
        IntegratedGradients,
        SequentialIG,
        DiscretizedIG,
        ExpectedGradients,
        SmoothGrad,
        GradientXInput,
        AttentionAware,
    )
}


def method_of(method: Method | str, *, shared: Mapping[str, Any] | None = None, **given: Any) -> Method:
    """A method from its name and fields.

    ``n_steps`` may be given for any method and is used by those that take steps; fields that are ``None`` keep their
    defaults.

    Args:
        method: its name, or the method itself.
        shared: what is given for several methods at once: each takes the fields it has.
        given: fields of this method.

    Raises:
        ValueError: an unknown name, a field the method does not have, or fields beside a method that is a value already.

    Examples:
        >>> method_of("integrated_gradients", n_steps=64)
        IntegratedGradients(n_steps=64, reference=None, nodes=None, layer=None)
        >>> method_of("gradient_x_input", shared={"n_steps": 64, "layer": 3})
        GradientXInput(layer=3)
    """
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(method, Method):
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be given beside a method value; set them on it: {type(method).__name__}(...)"
            )
        return method
    if method not in METHODS:
        raise OptionError(f"method={method!r} is not known; expected one of {', '.join(METHODS)}")
    kind = METHODS[method]
    known = kind.field_names()
    if "n_steps" not in known and "n_steps" in given:
        whole("n_steps", given.pop("n_steps"), 1)
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = f"its options are {', '.join(known)}" if known else "it takes no options"
        raise OptionError(f"method {method!r} takes no {', '.join(unknown)}; {has}")
    common = {name: value for name, value in (shared or {}).items() if name in known and value is not None}
    return kind(**{**common, **given})
