"""The vocabulary: what a model must offer, what a hook is, what a preference record is.

Axis names used in every shape: ``batch`` (rows of a forward pass), ``pos`` (token positions), ``d_model`` (residual
width), ``layer`` (counted from 0), ``record`` (preference records), ``vocab``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

#: A hook function ``fn(act, hook)``; returns the new activation, or ``None`` to leave it as it is.
HookFn = Callable[..., Any]

#: What ``run_with_hooks(fwd_hooks=...)`` and ``model.hooks(fwd_hooks=...)`` take.
FwdHooks = list[tuple[str, HookFn]]

#: One chat message: ``{"role": ..., "content": ...}``; the content is text, or a list of parts (``{"type": "image"}``,
#: ``{"type": "text", "text": ...}``) as vision-language models take them.
Message = Mapping[str, Any]

#: A prompt or response: plain text, or a conversation that goes through the model's chat template.
Text = str | Sequence[Message]


@runtime_checkable
class HookedModel(Protocol):
    """What the package needs of a model: a ``TransformerBridge`` or a ``HookedTransformer`` has all of it."""

    cfg: Any
    tokenizer: Any
    blocks: Any

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
