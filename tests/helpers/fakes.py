"""Stand-ins for a model, for tests that need only a part of one."""

from __future__ import annotations

from typing import Any

from grains_tl.types import HookedModel


class FakeModel(HookedModel):
    """Has every member of a model; a test defines what it needs, the rest refuses to run."""

    embed: Any = None
    unembed: Any = None
    hook_dict: Any = None
    training = False

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was run")

    __call__ = hooks = run_with_hooks = run_with_cache = generate = to_tokens = _run
    parameters = named_parameters = modules = named_modules = _run
