"""The vocabulary: what a model must offer, what a hook is, what a preference record is.

Axis names used in every shape: ``batch`` (rows of a forward pass), ``pos`` (token positions), ``d_model`` (residual
width), ``layer`` (counted from 0), ``record`` (preference records), ``vocab``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import nn

#: A hook function ``fn(act, hook)``; returns the new activation, or ``None`` to leave it as it is.
HookFn = Callable[..., Any]

#: What ``run_with_hooks(fwd_hooks=...)`` and ``model.hooks(fwd_hooks=...)`` take.
FwdHooks = list[tuple[str, HookFn]]


@runtime_checkable
class PromptHooks(Protocol):
    """Hooks that are made when it is known where the prompt ends: ``grains_tl.Steering``.

    Attributes:
        needs_prompt: whether that makes a difference.
    """

    @property
    def needs_prompt(self) -> bool: ...

    def for_prompt(self, prompt_len: Any, prompts: Any = None) -> FwdHooks: ...


#: One chat message: ``{"role": ..., "content": ...}``; the content is text, or a list of parts (``{"type": "image"}``,
#: ``{"type": "text", "text": ...}``) as vision-language models take them.
Message = Mapping[str, Any]

#: A prompt or response: plain text, or a conversation that goes through the model's chat template.
Text = str | Sequence[Message]


class _HasMembers(type(Protocol)):  # type: ignore[misc]
    """Lets ``isinstance`` ask for members as callers do.

    From Python 3.12 on, ``isinstance`` with a protocol looks at classes and instance dictionaries alone, and the modules of
    an ``nn.Module`` are in neither: no model would be a ``HookedModel``.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        named = {name for base in cls.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", {}))}
        return all(hasattr(instance, name) for name in named if not name.startswith("_"))


@runtime_checkable
class HookedModel(Protocol, metaclass=_HasMembers):
    """What the package needs of a model: a ``TransformerBridge`` or a ``HookedTransformer`` has all of it.

    Attributes:
        cfg: TransformerLens' configuration (``n_layers``, ``d_model``, ``d_vocab``, ``n_ctx``, ``model_name``, ...).
        tokenizer: of transformers.
        blocks: the transformer blocks, in order.
        embed, unembed: token ids to embeddings, and normalised residual to logits.
        hook_dict: hook points by name.
        training: ``False`` after ``model.eval()``.
    """

    cfg: Any
    tokenizer: Any
    blocks: Any
    embed: Any
    unembed: Any
    training: bool

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]: ...

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]: ...


class BridgeModel(HookedModel, Protocol):
    """A ``TransformerBridge``: a hooked model that wraps a Hugging Face model.

    Attributes:
        original_model: the Hugging Face model; its modules are the ones that run.
        processor: of a vision-language model, ``None`` for a text model.
    """

    original_model: Any
    processor: Any
