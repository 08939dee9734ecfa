"""``explore``: arguments checked, then a widget or a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

from grains_tl._util.checks import finite, listed, whole
from grains_tl._util.errors import OptionError, numbered
from grains_tl.attribution.methods import Method, method_of
from grains_tl.exploring.page import write_page
from grains_tl.exploring.views import Menu, Views, menu_of
from grains_tl.exploring.widget import Explorer
from grains_tl.hooks.sites import residual_stream_only
from grains_tl.models.state import require_ready
from grains_tl.records.pairs import prompt_list
from grains_tl.tokens.prompts import prompt_inputs
from grains_tl.types import HookedModel, Text
from grains_tl.vectors.matching import require_match
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.steering_vectors import SteeringVectors

#: What can be explored.
Explorable = SteeringVectors | Steering | Mapping[str, SteeringVectors | Steering]

#: Steps on a page, where none are given.
ALPHAS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)

#: Layers on a page, where none are given.
N_LAYERS = 4

#: Continued where no prompt is given.
PROMPT = "When I think about it, I"


@overload
def explore(
    model: HookedModel,
    vectors: Explorable,
    prompts: Text | Iterable[Text] = ...,
    *,
    static: None = ...,
    alphas: Sequence[float] | None = ...,
    layers: Sequence[int] | None = ...,
    kl: float = ...,
    max_new_tokens: int = ...,
    attribution: Method | str | None = ...,
) -> Explorer: ...


@overload
def explore(
    model: HookedModel,
    vectors: Explorable,
    prompts: Text | Iterable[Text] = ...,
    *,
    static: str | Path,
    alphas: Sequence[float] | None = ...,
    layers: Sequence[int] | None = ...,
    kl: float = ...,
    max_new_tokens: int = ...,
    attribution: Method | str | None = ...,
) -> Path: ...


def explore(
    model: HookedModel,
    vectors: Explorable,
    prompts: Text | Iterable[Text] = PROMPT,
    *,
    static: str | Path | None = None,
    alphas: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    kl: float = 0.05,
    max_new_tokens: int = 30,
    attribution: Method | str | None = "leave_one_out",
) -> Explorer | Path:
    """Try steering out: choose prompt, vector, layer and alpha, and read what changes and what it costs.

    Both continuations are shown side by side, every token tinted by how much the step raises or lowers its log-probability,
    above them the KL on neutral text, below them which prompt tokens speak for the steered text.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        vectors: ``SteeringVectors``, a ``Steering`` (its operator and positions are kept), or a dict of them by name.
        prompts: texts or conversations to choose from, or one of them; in a notebook any other can be typed.
        static: write a page to this file instead: everything is computed now, and the page opens without Python and
            without a network.
        alphas: steps of a page, 0 included anyway (default seven from -0.2 to 0.2); ends of the slider in a notebook.
        layers: which of the stored ones (default all in a notebook, up to 4 on a page).
        kl: the budget that the meter marks, nats per token of neutral text.
        max_new_tokens: of each continuation.
        attribution: method for the prompt's tokens (see ``attribute``), or ``None`` for none; on a page it takes most of
            the time.

    Returns:
        An ``Explorer``, which a notebook shows and whose ``.steering`` is what is set there; or the path of the page.

    Raises:
        ValueError: before anything runs: something else than vectors, vectors of another model, no prompts or alphas, a
            prompt that does not fit the context, an unknown method, a budget that is not positive, a folder as file.
        ImportError: no ``ipywidgets`` and no ``static``.

    Examples:
        >>> explore(model, vectors, ["The film was", [{"role": "user", "content": "How was it?"}]])   # doctest: +SKIP
        >>> explore(model, {"ours": ours, "caa": caa}, "The film was", static="page.html")            # doctest: +SKIP
    """
    menu = menu_of(vectors, layers)
    require_ready(model)
    for steps in menu.values():
        for step in steps.values():
            own = step.vectors
            residual_stream_only("explore", own.site)
            require_match(own.info, own.layers, int(own.directions.shape[1]), model)
    if not finite("kl", kl) > 0:
        raise OptionError(f"kl={kl}; expected a budget above 0 nats per token, such as 0.05")
    asked = _prompts(model, prompts, whole("max_new_tokens", max_new_tokens, 1))
    views = Views(model, max_new_tokens, method_of("leave_one_out" if attribution is None else attribution))
    attributed = attribution is not None
    if static is None:
        return Explorer(views, menu, asked, _alphas(alphas, menu), budget=kl, attributed=attributed)
    target = Path(static)
    if target.is_dir():
        raise OptionError(f"static={str(static)!r} is a folder; name a file, such as 'page.html'")
    few = {name: steps if layers is not None else _spread(steps) for name, steps in menu.items()}
    return write_page(target, views, few, asked, _alphas(alphas, menu), budget=kl, attributed=attributed)


def _prompts(model: HookedModel, prompts: Text | Iterable[Text], max_new_tokens: int) -> list[Text]:
    asked = prompt_list(prompts)
    if not asked:
        raise OptionError("no prompts; give at least one")
    n_ctx = int(model.cfg.n_ctx)
    for number, prompt in enumerate(asked, start=1):
        with numbered("prompt", number):
            length = len(prompt_inputs(model, prompt)[0])
            if length + max_new_tokens > n_ctx:
                raise OptionError(
                    f"{length} tokens and max_new_tokens={max_new_tokens} are more than the model's context of {n_ctx}"
                )
    return asked


def _alphas(given: Sequence[float] | None, menu: Menu) -> list[float]:
    """The steps in rising order, with 0; those of a ``Steering`` are among the default ones."""
    own = [step.alpha for steps in menu.values() for step in steps.values()]
    chosen = [finite("alpha", a) for a in (listed("alphas", given) if given is not None else [*ALPHAS, *own])]
    if not chosen:
        raise OptionError("no alphas; give at least one, for example alphas=[-0.2, 0.2]")
    return sorted({0.0, *(round(a, 6) for a in chosen)})


def _spread(steps: Mapping[str, Steering]) -> dict[str, Steering]:
    """A few of the layers, from the second quarter of the depth on, where steering is commonly done."""
    names = list(steps)
    if len(names) <= N_LAYERS:
        return dict(steps)
    places = {round((0.3 + 0.6 * i / (N_LAYERS - 1)) * (len(names) - 1)) for i in range(N_LAYERS)}
    return {names[place]: steps[names[place]] for place in sorted(places)}
