"""What gates are fitted on: residuals of prompts at a layer, a probe or a direction between two kinds, a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from grains_tl._util.errors import numbered
from grains_tl._util.files import short_hash
from grains_tl.hooks.cache import place_hook
from grains_tl.inference.batches import by_token_budget, image_inputs, pad_rows
from grains_tl.models.running import hooked, require_layers, run_blocks
from grains_tl.records.pairs import PreferencePair
from grains_tl.tokens.prompts import prompt_inputs
from grains_tl.types import HookedModel, Text

#: Prompts of either kind: texts, conversations, or records, of which the prompt and the images are taken.
Prompts = Iterable[Text | PreferencePair]


def listed_prompts(prompts: Prompts) -> list[Text | PreferencePair]:
    """The prompts as a list (ValueError: one alone, whose letters would count as prompts)."""
    if isinstance(prompts, (str, PreferencePair)):
        raise ValueError(f"prompts are one {type(prompts).__name__}; expected a list of texts or records")
    return list(prompts)


def prompt_residuals(
    model: HookedModel, prompts: Prompts, layer: int, every_token: bool
) -> tuple[Float[Tensor, "place d_model"], list[int], list[str]]:
    """Residuals of prompts after one block, on the CPU.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        prompts: see ``Prompts``.
        layer: counted from 0.
        every_token: of every token, or of each prompt's last one alone.

    Returns:
        ``[place, d_model]`` in the order of the prompts, the number of places of each prompt, and a hash of each prompt.

    Raises:
        ValueError: no prompts, one alone that is not in a list, an empty or too long one, a layer that the model lacks.
    """
    require_layers(model, [layer])
    encoded = []
    for number, prompt in enumerate(listed_prompts(prompts), start=1):
        with numbered("prompt", number):
            text, image = (prompt.prompt, prompt.image) if isinstance(prompt, PreferencePair) else (prompt, None)
            encoded.append(prompt_inputs(model, text, image))
    if not encoded:
        raise ValueError("no prompts; give at least one")
    counts = [len(ids) if every_token else 1 for ids, _ in encoded]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    found = torch.zeros(starts[-1], int(model.cfg.d_model))
    with torch.no_grad():
        for group in by_token_budget([len(ids) for ids, _ in encoded]):
            rows = [encoded[i][0] for i in group]
            ids, mask, offset = pad_rows(model, rows)
            places = [
                (r, p, starts[i] + k)
                for r, i in enumerate(group)
                for k, p in enumerate(range(len(rows[r])) if every_token else [len(rows[r]) - 1])
            ]
            row, pos, slot = torch.tensor(places).T
            store = torch.zeros(len(places), 1, int(model.cfg.d_model))
            inputs = image_inputs(model, [encoded[i][1] for i in group], ids, offset)
            with hooked(model, place_hook([layer], row, pos, store)):
                run_blocks(model, ids, mask, layer + 1, inputs)
            found[slot] = store[:, 0]
    names = [short_hash([ids, "" if images is None else images.digest]) for ids, images in encoded]
    return found, counts, names


def require_two_classes(
    model: HookedModel, targets: Prompts, neutral: Prompts, layer: int, every_token: bool
) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, "other d_model"], frozenset[str]]:
    """Residuals of both kinds of prompts, and the hashes of all.

    Raises:
        ValueError: fewer than two prompts of a kind, a prompt of both kinds, or residuals that are all alike.
    """
    sides = {"targets": listed_prompts(targets), "neutral": listed_prompts(neutral)}
    for name, prompts in sides.items():
        if len(prompts) < 2:
            raise ValueError(
                f"{name}: {len(prompts)} prompts; a gate is fitted on two kinds, at least 2 of each (20 or more are better)"
            )
    (yes, _, own), (no, _, other) = (prompt_residuals(model, p, layer, every_token) for p in sides.values())
    both = set(own) & set(other)
    if both:
        raise ValueError(f"{len(both)} prompts are among the targets and among the neutral ones; each has one kind")
    everything = torch.cat([yes, no])
    if not bool(torch.isfinite(everything).all()):
        raise ValueError(f"the residuals at layer {layer} have NaN or infinite entries")
    if bool((everything == everything[0]).all()):
        raise ValueError(
            f"all prompts have the same residual at layer {layer} (they end in the same tokens, and nothing else is read "
            "there); read a higher layer"
        )
    return yes, no, frozenset([*own, *other])


def fitted_probe(
    yes: Float[Tensor, "target d_model"], no: Float[Tensor, "other d_model"], strength: float
) -> tuple[Float[Tensor, "d_model"], float]:
    """Weights and bias of a logistic regression for residuals as they are, fitted on standardised ones."""
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([yes, no]).double()
    mean, scale = x.mean(0), x.std(0)
    scale = torch.where(scale > 1e-9 * x.abs().max(), scale, 1.0)  # a constant entry says nothing
    labels = torch.cat([torch.ones(len(yes)), torch.zeros(len(no))])
    probe = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    probe.fit(((x - mean) / scale).numpy(), labels.numpy())
    weights = torch.from_numpy(probe.coef_[0]) / scale
    return weights.float(), float(probe.intercept_[0] - (weights * mean).sum())


def directions_apart(
    yes: Float[Tensor, "target d_model"], no: Float[Tensor, "other d_model"]
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"]]:
    """From the mean of the one kind to that of the other, and the point half-way."""
    means = yes.double().mean(0), no.double().mean(0)
    return (means[0] - means[1]).float(), ((means[0] + means[1]) / 2).float()


def threshold_at(readings: Float[Tensor, "place"], rate: float, unit: str) -> float:
    """The reading that a further one of the same kind exceeds with a probability of at most ``rate``.

    Raises:
        ValueError: so few readings that no threshold can promise that.

    Examples:
        >>> threshold_at(torch.arange(19.0), 0.05, "prompts")
        18.0
    """
    n = len(readings)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if place > n:
        needed = math.ceil(1 / rate - 1e-9) - 1
        raise ValueError(
            f"{n} {unit} cannot show a false-fire rate of {rate:g}; give at least {needed}, or allow a rate of "
            f"{1 / (n + 1):.2g}"
        )
    return float(readings.sort().values[place - 1])
