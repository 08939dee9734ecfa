"""Several steerings at once: added up, made orthogonal, or one for each row of a batch.

1. ``a + b`` applies both. At a layer that both steer, a comes first and b sees what a left; ``"add"`` steps commute, other
   operators need not.
2. Gates read before anything is steered, so a gate at a steered layer decides on the residual as it was.
3. ``orthogonal()`` takes out of each direction what the ones before it have at that layer. Then ``"ablate"``, ``"match"``
   and ``"clamp"`` steps no longer disturb one another: together they act on the subspace of all directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of
from grains_tl.hooks.gate_run import GateRun
from grains_tl.hooks.layer_gates import LayerGate
from grains_tl.hooks.weights import PromptKey
from grains_tl.models.running import hooked
from grains_tl.types import FwdHooks, HookedModel
from grains_tl.vectors.torch_hooks import TorchHooks

#: A direction of which less is left lies in the span of those before it.
NOTHING_LEFT = 1e-4

#: What a manifest says of a direction as it was.
FORGOTTEN = ("means", "chosen", "found", "evidence")


class Steps:
    """What one steering and a sum of several have in common: how they are added up and applied."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """The steerings it consists of, in the order in which they act."""
        return (self,)

    def for_prompt(
        self, prompt_len: int | Int[Tensor, "batch"] | None, prompts: Sequence[PromptKey] | None = None
    ) -> FwdHooks:
        """The hooks for runs whose prompts end at ``prompt_len`` (padding in front included; one number, or one a row)."""
        raise NotImplementedError

    def __add__(self, other: Any) -> CombinedSteering:
        """Both at once; this one acts first at a layer that both steer."""
        if not isinstance(other, Steps):
            return NotImplemented
        return CombinedSteering((*self.parts, *other.parts))

    def __radd__(self, other: Any) -> Any:
        """``sum([a, b])`` begins with the number 0."""
        return self if isinstance(other, (int, float)) and other == 0 else NotImplemented

    def hooks(self) -> FwdHooks:
        """``[(hook name, fn)]`` for ``run_with_hooks`` or ``model.hooks``.

        A run over several positions is then taken as a prompt, and each position that is decoded alone as a generated
        one; ``for_prompt`` is for runs over whole sequences. A gate with a layer of its own has its reading hook in front.
        """
        return self.for_prompt(None)

    @contextmanager
    def applied(
        self, model: HookedModel, *, prompt_len: int | Int[Tensor, "batch"] | None = None
    ) -> Iterator[HookedModel]:
        """Steer everything that runs in the ``with`` block; the hooks are removed at its end, also after an error.

        Args:
            model: a ``TransformerBridge`` or ``HookedTransformer``.
            prompt_len: where the prompts end, for runs over whole sequences; see ``hooks`` for runs without it.

        Yields:
            The model.

        Examples:
            >>> with vectors.steering(0.2, 12).applied(model):        # doctest: +SKIP
            ...     logits = model(tokens)
        """
        with hooked(model, self.for_prompt(prompt_len)):
            yield model

    def torch_hooks(self, hf_model: Any, *, prompt_len: int | Int[Tensor, "batch"] | None = None) -> TorchHooks:
        """Steer a plain Hugging Face model: the same step, by PyTorch forward hooks on its decoder layers.

        For a model that stays outside TransformerLens: in a server, in a training loop, with ``generate`` of transformers.
        Scopes need no ``prompt_len`` in generation with a key-value cache, as transformers does by default: the first run
        over several positions is the prompt. Without a cache, with speculative decoding or a prompt in chunks it is needed.
        A mask or a ``[batch, pos]`` gate counts positions from the beginning of the text, padding included; behind its end
        nothing is steered. Weights (``hooks.Weighted``) count alike, with ``after`` behind their end; weights by prompt are
        found by the tokens of each row.

        Args:
            hf_model: a decoder-only model of transformers: Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, OLMo, Phi, Mixtral,
                LLaVA, Qwen-VL, ... with peft adapters or without.
            prompt_len: where the prompts end, padding in front included; one number, or one a row.

        Returns:
            The hooks, registered: ``remove()`` takes them off, as does the end of a ``with`` block, also after an error.

        Raises:
            ValueError: vectors that do not fit the model, a TransformerLens model, one whose layers are not found; during a
                run, positions whose place in the text cannot be known.

        Examples:
            >>> with vectors.steering(0.2, 12).torch_hooks(hf_model):         # doctest: +SKIP
            ...     hf_model.generate(**tokenizer("The film was", return_tensors="pt"))
        """
        return TorchHooks(self, hf_model, prompt_len)


@dataclass(frozen=True, eq=False, repr=False)
class CombinedSteering(Steps):
    """Several steerings at once, as ``a + b`` gives it; whatever takes ``fwd_hooks`` takes it.

    Attributes:
        steerings: at a layer that several steer they act in this order.

    Raises:
        ValueError: no steering, something that is no steering, or a gate that would read behind a steered layer.

    Examples:
        >>> import torch
        >>> from grains_tl.vectors import SteeringVectors
        >>> v = SteeringVectors(torch.eye(2), (4, 5), torch.ones(2), torch.full((2,), 50.0), {"method": "warm"})
        >>> (v.steering(0.2, 4) + v.steering(-0.1, 5, operator="add")).label
        'warm, alpha +0.2, layer 4 + warm, alpha -0.1, layer 5, add'
    """

    steerings: tuple[Any, ...]

    def __post_init__(self) -> None:
        given = tuple(self.steerings)
        if not given or not all(isinstance(one, Steps) and one.parts == (one,) for one in given):
            kinds = [type(one).__name__ for one in given]
            raise OptionError(f"steerings are {kinds}; expected one Steering or more, as a + b gives")
        object.__setattr__(self, "steerings", given)
        steered = [layer - (one.vectors.site != "resid_post") for one in given for layer in one.layers]
        for one in given:
            if isinstance(one.gate, LayerGate):
                one.gate.require_below(steered)

    @classmethod
    def per_row(cls, steerings: Sequence[Any]) -> CombinedSteering:
        """One steering for each row of a batch: several requests that are answered together.

        The batch must have as many rows, in this order (``generate(model, prompts, ..., batch_size=len(prompts))``).

        Args:
            steerings: a ``Steering``, a sum of some, or ``None`` for a row that stays as it is; several rows may share one.

        Returns:
            What steers the whole batch.

        Raises:
            ValueError: something that is no steering, or no row that is steered.

        Examples:
            >>> both = CombinedSteering.per_row([formal, None, friendly])                        # doctest: +SKIP
            >>> generate(model, ["Hi", "Hi", "Hi"], both)                                        # doctest: +SKIP
        """
        given = list(steerings)
        wrong = [type(one).__name__ for one in given if one is not None and not isinstance(one, Steps)]
        if wrong:
            raise OptionError(f"rows are steered by {wrong}; expected a Steering or None for each row")
        distinct = {id(one): one for one in given if one is not None}
        rows = {name: [one is not None and id(one) == name for one in given] for name in distinct}
        return cls(tuple(part.at_rows(rows[name]) for name, one in distinct.items() for part in one.parts))

    @property
    def parts(self) -> tuple[Any, ...]:
        """The steerings, in the order in which they act."""
        return self.steerings

    @property
    def layers(self) -> tuple[int, ...]:
        """All steered layers, rising."""
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    @property
    def label(self) -> str:
        """The labels of its parts."""
        return " + ".join(part.label for part in self.parts)

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"CombinedSteering({self.label})"

    @property
    def key(self) -> str:
        """What the hooks do, for checkpoints; empty where a part has none."""
        keys = [part.key for part in self.parts]
        return hash_of(["sum", *keys]) if all(keys) else ""

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return all(part.idle for part in self.parts)

    @property
    def needs_prompt(self) -> bool:
        """Whether it acts differently before and after the end of the prompt."""
        return any(part.needs_prompt for part in self.parts)

    @property
    def needs_ids(self) -> bool:
        """Whether ``for_prompt`` has to be told the prompts' tokens."""
        return any(part.needs_ids for part in self.parts)

    def for_prompt(
        self, prompt_len: int | Int[Tensor, "batch"] | None, prompts: Sequence[PromptKey] | None = None
    ) -> FwdHooks:
        """The hooks for runs whose prompts end at ``prompt_len``; those that read for a gate come first."""
        made = [pair for part in self.parts for pair in part.for_prompt(prompt_len, prompts)]
        return sorted(made, key=lambda pair: not isinstance(pair[1], GateRun))  # stable

    def scaled(self, factor: float | int) -> CombinedSteering:
        """The same with every alpha multiplied."""
        return replace(self, steerings=tuple(part.scaled(factor) for part in self.parts))

    def at_rows(self, rows: Sequence[bool]) -> CombinedSteering:
        """The same for some rows of a batch; see ``Steering.at_rows``."""
        return replace(self, steerings=tuple(part.at_rows(rows) for part in self.parts))

    def orthogonal(self) -> CombinedSteering:
        """The same with directions that are orthogonal at every layer: each loses what the parts before it have of it.

        The first keeps its direction, so the order matters. Alphas stay. Vectors whose direction changes forget their class
        means: give ``with_means`` vectors that are orthogonal already (``part.vectors`` of the result).

        Returns:
            Steerings of orthogonal directions.

        Raises:
            ValueError: a direction that lies in the span of those before it; a ``"match"`` step that would change.

        Examples:
            >>> import torch
            >>> from grains_tl.vectors import SteeringVectors
            >>> a, b = (SteeringVectors.from_raw(torch.tensor([raw]), [3], torch.ones(1)) for raw in ([1.0, 0], [1.0, 1]))
            >>> (a.steering(1, 3) + b.steering(1, 3)).orthogonal().parts[1].vectors.directions.tolist()
            [[0.0, 1.0]]
        """
        before: dict[tuple[str, int], list[Tensor]] = {}
        changed = []
        for number, part in enumerate(self.parts, start=1):
            vectors = part.vectors.at(list(part.layers))
            rows = zip(vectors.layers, vectors.directions.double(), strict=True)
            left = torch.stack(
                [_without(direction, before.get((vectors.site, layer), [])) for layer, direction in rows]
            )
            sizes = left.norm(dim=-1)
            inside = [
                layer
                for layer, size, direction in zip(vectors.layers, sizes.tolist(), vectors.directions, strict=True)
                if size < NOTHING_LEFT and bool(direction.any())
            ]
            if inside:
                raise OptionError(
                    f"at layers {inside} the direction of part {number} ({part.label}) lies in the span of those before "
                    "it, so nothing of it would be left; leave it out"
                )
            units = torch.where(sizes[:, None] > 0, left / sizes[:, None], 0.0)
            for layer, own in zip(vectors.layers, units, strict=True):
                before.setdefault((vectors.site, layer), []).append(own)
            changed.append(_with_directions(part, vectors, units, sizes))
        return replace(self, steerings=tuple(changed))


def _without(
    direction: Float[Tensor, "d_model"], others: Sequence[Float[Tensor, "d_model"]]
) -> Float[Tensor, "d_model"]:
    for other in others:
        direction = direction - (direction @ other) * other
    return direction


def _with_directions(
    part: Any, vectors: Any, units: Float[Tensor, "layer d_model"], sizes: Float[Tensor, "layer"]
) -> Any:
    """A steering along other directions; the same one where they are what they were."""
    if bool((units - vectors.directions.double()).abs().max() < 1e-6):
        return part
    about = {key: value for key, value in vectors.info.items() if key not in FORGOTTEN}
    other = replace(
        vectors,
        directions=units.to(vectors.directions.dtype),
        magnitudes=vectors.magnitudes * sizes.to(vectors.magnitudes),
        info={**about, "orthogonal": True},
    )
    return replace(part, vectors=other)
