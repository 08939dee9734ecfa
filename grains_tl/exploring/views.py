"""What an explorer shows of one prompt under one step: both texts token by token, the price, and the prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grains_tl._util import html
from grains_tl._util.errors import OptionError
from grains_tl._util.files import hash_of
from grains_tl.attribution.api import attribute
from grains_tl.attribution.methods import Method
from grains_tl.attribution.result import Attribution
from grains_tl.evaluate.costs import kl_per_token, text_costs
from grains_tl.evaluate.generations import token_changes
from grains_tl.evaluate.quality import text_quality
from grains_tl.inference.generation import generate
from grains_tl.records.loading import neutral_texts
from grains_tl.records.pairs import PreferencePair
from grains_tl.types import HookedModel, Text
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Neutral texts that the price is measured on.
N_NEUTRAL = 5

#: A token whose log-probability changes by this much, nats, has the strongest tint; the same on every view.
STRONGEST = 3.0

#: The meter's right end, as a multiple of the budget.
METER = 4.0

#: By name of the vector and layers: the step, whose alpha is replaced.
Menu = Mapping[str, Mapping[str, Steering]]


@dataclass(frozen=True, eq=False)
class View:
    """One prompt under one step.

    Attributes:
        prompt: text or conversation.
        steering: the step.
        texts: the unsteered and the steered continuation.
        base: tokens of the unsteered continuation, each with the change of its log-probability under the step, nats.
        steered: the same of the steered continuation.
        kl: KL(steered || base) on neutral text, nats per token; NaN where nothing can be measured.
        text_kl: the same along the steered continuation.
        repetition: share of the steered text's runs of three words that occurred before.
        attribution: which prompt tokens make the steered text likelier than the unsteered one, in the unsteered model;
            ``None`` if not asked for, or if both texts are the same.

    Examples:
        >>> view = explore(model, vectors).view                                    # doctest: +SKIP
        >>> print(view.texts[1], view.kl)                                            # doctest: +SKIP
    """

    prompt: Text
    steering: Steering
    texts: tuple[str, str]
    base: tuple[tuple[str, float], ...]
    steered: tuple[tuple[str, float], ...]
    kl: float
    text_kl: float
    repetition: float
    attribution: Attribution | None = None

    @property
    def changed(self) -> bool:
        """Whether the step changes the text."""
        return self.texts[0] != self.texts[1]


@dataclass
class Views:
    """Computes views and keeps their parts, so that a menu or slider that comes back costs nothing.

    Attributes:
        model: what is steered.
        max_new_tokens: longest continuation.
        method: of the attribution.
    """

    model: HookedModel
    max_new_tokens: int
    method: Method
    _texts: dict[str, str] = field(default_factory=dict, repr=False)
    _costs: dict[str, float] = field(default_factory=dict, repr=False)
    _scores: dict[str, Attribution | None] = field(default_factory=dict, repr=False)

    def view(self, prompt: Text, steering: Steering, *, attributed: bool = False) -> View:
        """One prompt under one step."""
        return self.views([prompt], steering, attributed=attributed)[0]

    def views(self, prompts: Sequence[Text], steering: Steering, *, attributed: bool = False) -> list[View]:
        """Several prompts under one step, generated together."""
        base, steered = self.texts(prompts, None), self.texts(prompts, steering)
        n = len(prompts)
        changes = token_changes(self.model, steering, [*prompts, *prompts], [*base, *steered])
        repetition = text_quality(steered)["repetition"].tolist()
        (kl,) = self.costs([steering])
        tokens = [tuple(zip(c["token"], c["change"].astype(float), strict=True)) for c in changes]
        return [
            View(
                prompt=prompt,
                steering=steering,
                texts=(base[i], steered[i]),
                base=tokens[i],
                steered=tokens[n + i],
                kl=kl,
                text_kl=float(changes[n + i]["kl"].mean()),
                repetition=float(repetition[i]),
                attribution=self.attribution(prompt, steered[i], base[i]) if attributed else None,
            )
            for i, prompt in enumerate(prompts)
        ]

    def texts(self, prompts: Sequence[Text], steering: Steering | None) -> list[str]:
        """Continuations, from memory where they are there."""
        if steering is not None and steering.idle:
            steering = None
        step = "" if steering is None else steering.key
        keys = [hash_of([step, prompt]) for prompt in prompts]
        known = steering is None or bool(step)  # a gate without a name may do something else each time
        missing = [i for i, key in enumerate(keys) if not known or key not in self._texts]
        if missing:
            asked = [prompts[i] for i in missing]
            made = generate(self.model, asked, steering, max_new_tokens=self.max_new_tokens)
            self._texts |= {keys[i]: text for i, text in zip(missing, made, strict=True)}
        return [self._texts[key] for key in keys]

    def costs(self, steps: Sequence[Steering]) -> list[float]:
        """KL on neutral text of each step, nats per token."""
        missing = {
            step.key or str(i): step for i, step in enumerate(steps) if not step.key or step.key not in self._costs
        }
        if missing:
            frame = text_costs(self.model, list(missing.values()), neutral_texts(N_NEUTRAL))
            self._costs |= dict(zip(missing, kl_per_token(frame, len(missing)).tolist(), strict=True))
        return [self._costs[step.key or str(i)] for i, step in enumerate(steps)]

    def attribution(self, prompt: Text, steered: str, base: str) -> Attribution | None:
        """Which prompt tokens make the steered text likelier than the unsteered one."""
        if not (steered.strip() and base.strip()) or steered == base:
            return None
        key = hash_of([prompt, steered, base])
        if key not in self._scores:
            pair = PreferencePair(prompt, chosen=steered, rejected=base)
            self._scores[key] = attribute(self.model, pair, method=self.method, content_only=True)
        return self._scores[key]


def menu_of(vectors: Any, layers: Sequence[int] | None) -> dict[str, dict[str, Steering]]:
    """The vectors by name, and for each the layers that can be chosen.

    Args:
        vectors: ``SteeringVectors`` (each of its layers can be chosen), a ``Steering`` (its layers go together), or a
            mapping from names to these.
        layers: only these layers of ``SteeringVectors``.

    Raises:
        ValueError: something else, nothing, or a layer that is not stored.
    """
    given = vectors if isinstance(vectors, Mapping) else {_name(vectors): vectors}
    if not given:
        raise OptionError("no vectors; give SteeringVectors, vectors.steering(alpha, layer), or a dict of them by name")
    menu: dict[str, dict[str, Steering]] = {}
    for name, one in given.items():
        if isinstance(one, Steering):
            menu[str(name)] = {", ".join(map(str, one.layers)): one}
        elif isinstance(one, SteeringVectors):
            menu[str(name)] = {str(layer): one.steering(0.0, layer) for layer in one.layer_list(layers)}
        else:
            raise OptionError(
                f"vectors {name!r} are a {type(one).__name__}; expected SteeringVectors, or vectors.steering(alpha, layer)"
            )
        if not menu[str(name)]:
            raise OptionError("layers=[]; name some of the stored ones")
    return menu


def _name(vectors: Any) -> str:
    info = getattr(vectors, "info", getattr(getattr(vectors, "vectors", None), "info", {}))
    return str(info.get("method", "vector"))


def at_alpha(step: Steering, alpha: float) -> Steering:
    """The same step at another size."""
    return replace(step, alpha=alpha)


def view_html(view: View, budget: float) -> str:
    """A view as HTML with inline styles, for a notebook."""
    side = "flex:1 1 18em;min-width:0"
    texts = html.element(
        "div",
        html.element("div", _panel("unsteered", view.base), side)
        + html.element("div", _panel(f"steered, alpha {html.number(view.steering.alpha, '+.3g')}", view.steered), side),
        "display:flex;flex-wrap:wrap;gap:1em",
    )
    same = [] if view.changed else [html.note("The step does not change the text.")]
    about = f"KL along the steered text {html.number(view.text_kl, '.3f')}, repetition {html.percent(view.repetition)}"
    scale = f"Tint: log p with steering minus without; the strongest is {STRONGEST:g} nats (blue up, red down)."
    parts = [meter(view.kl, budget), texts, *same, html.note(f"{about}. {scale}")]
    if view.attribution is not None:
        parts += [html.title("Which prompt tokens", "speak for the steered text"), view.attribution.as_html()]
    return html.frame(*parts)


def meter(kl: float, budget: float) -> str:
    """A bar for the KL on neutral text; the line in it is the budget."""
    known = kl == kl
    share = min(1.0, (max(kl, 0.0) / (METER * budget)) ** 0.5) if known else 0.0
    colour = "#228833" if known and kl <= budget else "#b2182b"
    bar = html.element("div", "", f"background:{colour};height:100%;width:{100 * share:.1f}%")
    line = html.element(
        "div", "", f"position:absolute;left:{100 * METER**-0.5:.1f}%;top:-2px;bottom:-2px;border-left:2px solid"
    )
    track = html.element("div", bar + line, "position:relative;height:.7em;background:#8883;margin:.2em 0")
    said = f"{html.number(kl, '.3f')} nats per token of neutral text, budget {budget:g}" if known else "not measurable"
    return html.title("KL", said) + track


def _panel(name: str, tokens: Sequence[tuple[str, float]]) -> str:
    shown = "".join(_token(text, change) for text, change in tokens) or html.note("(nothing)")
    box = "white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8886;padding:.5em .7em;line-height:1.8"
    return html.title(name) + html.element("div", shown, box)


def _token(text: str, change: float) -> str:
    bare = text.lstrip(" ") or text
    gap = " " * (len(text) - len(bare))
    title = f"log p {html.signed(change)} nats"
    return gap + html.element("span", html.text(bare), html.tint(change, STRONGEST), title=title)
