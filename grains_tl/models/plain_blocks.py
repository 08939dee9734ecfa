"""Generation at the speed of plain transformers: a bridge's components step aside where no hook needs them.

A ``TransformerBridge`` puts a component of its own around every module of the Hugging Face model, down to single linear
layers. In decoding, where a step is one token, these wrappers cost about a quarter of the time. For the length of a run
they can be taken out wherever no hook is; what they wrap is what they would have called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from grains_tl._util.errors import MODEL_ERRORS
from grains_tl.models.identity import without_hooks
from grains_tl.models.precision import agrees
from grains_tl.models.running import device_of, is_bridge, without_image_tokens
from grains_tl.types import BridgeModel, HookedModel

ORIGINAL = "_original_component"


def runs_plain(model: HookedModel) -> bool:
    """Whether a bridge computes the same without its components, so that ``plain_blocks`` may take them out.

    Compared on a short run without hooks, the first time and whenever weights or modules have changed since. ``False``
    where they differ (folded weights, an adapter on a part that the bridge made itself), and for a ``HookedTransformer``.
    """
    if not is_bridge(model) or not isinstance(model, nn.Module):  # a stand-in without modules
        return False
    plan = _plan(model)
    state = plan.state()
    if plan.compared != state:
        with suppress(AttributeError, *MODEL_ERRORS):  # a model that does not run as it is gets its own error later
            (plan.agree, plan.by_place), plan.compared = _compare(model, plan), state
    return plan.agree and plan.compared == state


#: Rows and positions of a batch, ``[place]`` each.
Places = tuple[Int[Tensor, "place"], Int[Tensor, "place"]]


@contextmanager
def plain_blocks(model: HookedModel, read: Places | None = None) -> Iterator[None]:
    """Run a bridge's own Hugging Face modules inside the ``with`` block, except where hooks are registered now.

    Ask ``runs_plain`` first; hooks must be registered before, not inside. Hooks on the residual stream
    (``hook_resid_pre``, ``hook_resid_post``) run from torch hooks on the block itself; a block with hooks further inside
    stays as it is. Everything is put back afterwards, also after an exception.

    Args:
        model: a bridge for which ``runs_plain`` is true.
        read: the only places whose logits will be looked at: nothing else needs the MLP of the last block.
    """
    plan = _plan(model)
    swaps = [wrapper for wrapper in plan.free() if wrapper.is_block or not wrapper.busy_around()]
    handles: list[Any] = []
    try:
        for wrapper in swaps:
            wrapper.parent._modules[wrapper.name] = wrapper.original
            if wrapper.busy_around():
                handles += _run_around(wrapper)
        if read is not None and plan.by_place:
            handles += _last_mlp_at(model, swaps, read)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for wrapper in swaps:
            wrapper.parent._modules[wrapper.name] = wrapper.component


def _last_mlp_at(model: HookedModel, swaps: Sequence[_Wrapper], read: Places) -> list[Any]:
    """Run the last block's MLP at some places only, and give zeros everywhere else; not where a hook may look at it."""
    block, mlp = model.blocks[-1], getattr(model.blocks[-1], "mlp", None)
    plain = {id(wrapper.component): wrapper for wrapper in swaps}
    if id(block) not in plain or id(mlp) not in plain or plain[id(block)].busy_around():
        return []
    shape: list[torch.Size] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or args[0].ndim != 3:
            return None
        row, pos = (place.to(args[0].device) for place in read)
        shape.append(args[0].shape)
        return (args[0][row, pos][None], *args[1:])

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if not shape:
            return None
        row, pos = (place.to(args[0].device) for place in read)
        some = output[0] if isinstance(output, tuple) else output
        whole = some.new_zeros(*shape.pop()[:2], some.shape[-1]).index_put((row, pos), some[0])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    original = plain[id(mlp)].original
    return [original.register_forward_pre_hook(enter, prepend=True), original.register_forward_hook(leave)]


@dataclass(frozen=True)
class _Wrapper:
    """A component of the bridge in its place in the Hugging Face model.

    Attributes:
        parent, name, component: ``parent._modules[name] is component``.
        original: what it wraps.
        ends: the hook points before and after it.
        is_block: whether it does nothing but run them and the original.
        points, components: all hook points and components further in.
        after: index in the plan of the first wrapper that is not inside this one.
    """

    parent: nn.Module
    name: str
    component: nn.Module
    original: nn.Module
    ends: tuple[Any, ...]
    is_block: bool
    points: tuple[Any, ...]
    components: tuple[nn.Module, ...]
    after: int

    def in_place(self) -> bool:
        return self.parent._modules.get(self.name) is self.component and _original(self.component) is self.original

    def busy_inside(self) -> bool:
        return any(p.fwd_hooks or p.bwd_hooks for p in self.points) or any(_torch_hooks(c) for c in self.components)

    def busy_around(self) -> bool:
        return any(p.fwd_hooks or p.bwd_hooks for p in self.ends)


#: A parameter in its place: the module that holds it, its name there, and the parameter.
_Weight = tuple[nn.Module, str, nn.Parameter]


@dataclass
class _Plan:
    """The wrappers in a model, outermost first, and what was last found about them.

    Attributes:
        wrappers: each before those inside it.
        weights: everything that runs without the wrappers.
        copies: what only the bridge runs (query, key and value cut from a joint projection).
        compared: the state of the weights when both ways were last compared.
        agree: whether they gave the same.
        by_place: whether the last block's MLP, too, may run at single places.
    """

    wrappers: list[_Wrapper]
    weights: list[_Weight]
    copies: list[_Weight]
    compared: tuple[Any, ...] | None = None
    agree: bool = False
    by_place: bool = False

    def fits(self) -> bool:
        """Whether modules and parameters are still those the plan was made of."""
        weights = (*self.weights, *self.copies)
        return all(w.in_place() for w in self.wrappers) and all(m._parameters.get(n) is p for m, n, p in weights)

    def free(self) -> Iterator[_Wrapper]:
        """The wrappers with no hook inside them."""
        i = 0
        while i < len(self.wrappers):
            wrapper = self.wrappers[i]
            busy = wrapper.busy_inside()
            i = wrapper.after if busy else i + 1
            if not busy and not _torch_hooks(wrapper.component):
                yield wrapper

    def state(self) -> tuple[Any, ...]:
        """Something that changes when a weight does."""
        versions = [(_version(p), _place(p)) for _, _, p in (*self.weights, *self.copies)]
        # a copy in memory of its own can drift apart from the weights
        memory = {_place(p, of_storage=True) for _, _, p in self.weights}
        own = [p for _, _, p in self.copies if _place(p, of_storage=True) not in memory]
        return (*versions, *(float(p.detach().sum(dtype=torch.float64)) for p in own))


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _place(parameter: nn.Parameter, of_storage: bool = False) -> int:
    """Where a parameter lies in memory; quantised ones that are made of several tensors have no place of their own."""
    try:
        return parameter.untyped_storage().data_ptr() if of_storage else parameter.data_ptr()
    except RuntimeError:
        return id(parameter)


_PLANS: WeakKeyDictionary[Any, _Plan] = WeakKeyDictionary()


def _plan(model: Any) -> _Plan:
    plan = _PLANS.get(model)
    if plan is None or not plan.fits():
        plan = _PLANS[model] = _make_plan(model)
    return plan


def _make_plan(model: BridgeModel) -> _Plan:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.block import BlockBridge

    wrappers: list[Any] = []
    weights: list[_Weight] = []

    def visit(parent: nn.Module) -> None:
        weights.extend((parent, name, p) for name, p in parent._parameters.items() if p is not None)
        for name, child in parent._modules.items():
            original = None if child is None else _original(child)
            if child is None or isinstance(child, HookPoint):
                continue
            if original is None:
                visit(child)
                continue
            ends = (child._modules["hook_in"], child._modules["hook_out"])
            is_block = type(child).forward is BlockBridge.forward
            inside = [m for m in child.modules() if m is not child and m not in ends]
            points = tuple(m for m in inside if isinstance(m, HookPoint))
            components = tuple(m for m in inside if _original(m) is not None)
            place = len(wrappers)
            wrappers.append(None)
            visit(original)
            wrappers[place] = _Wrapper(parent, name, child, original, ends, is_block, points, components, len(wrappers))

    # what sees images is left alone: the comparison has none to look at
    visit(model.blocks if getattr(model.cfg, "is_multimodal", False) else model.original_model)
    shared = {id(p) for _, _, p in weights}
    held = ((m, name, p) for m in model.blocks.modules() for name, p in m._parameters.items() if p is not None)
    return _Plan(wrappers, weights, [(m, name, p) for m, name, p in held if id(p) not in shared])


def _original(module: nn.Module) -> nn.Module | None:
    return module._modules.get(ORIGINAL)


def _torch_hooks(module: nn.Module) -> bool:
    """Whether a component has torch hooks; those of TransformerLens itself feed hook points, which are looked at anyway."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    fns = [fn for part in own if part for fn in part.values()]
    return any(str(getattr(fn, "__module__", "")).partition(".")[0] != "transformer_lens" for fn in fns)


def _run_around(wrapper: _Wrapper) -> list[Any]:
    """Run the hook points of a block from torch hooks on what it wraps, as the block itself does."""
    before, after = wrapper.ends

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args and isinstance(args[0], Tensor):
            return (before(args[0]), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return args, {**kwargs, "hidden_states": before(kwargs["hidden_states"])}
        return args, kwargs

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (after(output[0]), *output[1:]) if isinstance(output, tuple) else after(output)

    # the residual stream is edited first and last, whatever other torch hooks the block has
    return [
        wrapper.original.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        wrapper.original.register_forward_hook(leave),
    ]


def _compare(model: BridgeModel, plan: _Plan) -> tuple[bool, bool]:
    """Whether all positions agree, and whether the last one does if the last MLP runs only there."""
    ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, 8).long()[None].to(device_of(model))
    ids = without_image_tokens(model, ids)

    def logprobs() -> Tensor:
        return model.original_model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    last = (torch.tensor([0]), torch.tensor([ids.shape[1] - 1]))
    handles: list[Any] = []
    with torch.no_grad(), without_hooks(model):
        wrapped = logprobs()
        try:
            for wrapper in plan.wrappers:
                wrapper.parent._modules[wrapper.name] = wrapper.original
            plain = logprobs()
            handles = _last_mlp_at(model, plan.wrappers, last)
            end = logprobs()[:, -1]
        finally:
            for handle in handles:
                handle.remove()
            for wrapper in plan.wrappers:
                wrapper.parent._modules[wrapper.name] = wrapper.component
    return agrees(model, plain, wrapped), agrees(model, end, plain[:, -1])
