"""The shape annotations mean something: they can be resolved, and the suite runs with them switched on."""

from __future__ import annotations

import builtins
import dis
import importlib
import inspect
import pkgutil
import types
import typing

import pytest
import torch
from jaxtyping import TypeCheckError

import grains_tl as gr

MODULES = [
    m.name.removeprefix("grains_tl.")
    for m in pkgutil.walk_packages(gr.__path__, "grains_tl.")
    if m.name != "grains_tl.__main__"
]


# Was a bug: ruff's UP037 took the quotes off one-axis shapes (Float[Tensor, "d_model"]); such an annotation names an
# undefined variable, cannot be resolved, and switches the checks of its whole function off without a word.
@pytest.mark.parametrize("name", MODULES)
def test_annotations_can_be_resolved(name: str) -> None:
    module = importlib.import_module(f"grains_tl.{name}")
    things = [o for o in vars(module).values() if getattr(o, "__module__", None) == module.__name__]
    for thing in things:
        if inspect.isfunction(thing):
            typing.get_type_hints(inspect.unwrap(thing))
        elif inspect.isclass(thing):  # bases are looked at where they are defined; those of pandas cannot be resolved
            own = {"__annotations__": inspect.get_annotations(thing), "__module__": name}
            typing.get_type_hints(type(thing.__name__, (), own), vars(module))


# The linters cannot look for undefined names: to them the axis names of shapes are some.
@pytest.mark.parametrize("name", MODULES)
def test_every_global_name_exists(name: str) -> None:
    module = importlib.import_module(f"grains_tl.{name}")
    todo = [compile(inspect.getsource(module), name, "exec")]
    while todo:
        code = todo.pop()
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        assert not {n for n in used if n not in vars(module) and not hasattr(builtins, n)}, code.co_name


# Was a bug: see above.
def test_wrong_shapes_are_refused_under_test() -> None:
    with pytest.raises(TypeCheckError, match="direction"):
        gr.hooks.steer_hook(0, torch.ones(2, 2), 1.0)
    with pytest.raises(TypeCheckError, match="masked"):
        gr.hooks.mask_hook(typing.cast(typing.Any, None), torch.ones(2, dtype=torch.bool))
