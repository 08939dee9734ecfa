"""The explorer in a notebook: menus, a slider and two texts, with ipywidgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from grains_tl._util import html
from grains_tl._util.settings import settings
from grains_tl.exploring.views import Menu, View, Views, at_alpha, view_html
from grains_tl.records.pairs import plain_text
from grains_tl.types import Text
from grains_tl.vectors.steering import Steering

#: How a prompt that was typed is meant.
KINDS = ("text", "chat")


class Explorer:
    """What ``explore`` shows in a notebook; ``steering`` and ``view`` are what is set and shown there.

    Args:
        views: computes what is shown.
        menu: vectors and layers.
        prompts: the first of the prompt menu; others can be typed.
        alphas: the slider goes from the smallest to the largest.
        budget: that the meter marks, nats per token.
        attributed: score the prompt's tokens from the start.

    Attributes:
        steering: the step that is set: ``explorer.steering.hooks()``.
        view: what is shown; ``None`` if it could not be computed.
        box: the widget.

    Raises:
        ImportError: no ``ipywidgets``.

    Examples:
        >>> explorer = explore(model, vectors, "The film was")                     # doctest: +SKIP
        >>> explorer.steering.label                                                # doctest: +SKIP
        'caa, alpha +0.1, layer 20'
    """

    def __init__(
        self,
        views: Views,
        menu: Menu,
        prompts: Sequence[Text],
        alphas: Sequence[float],
        *,
        budget: float,
        attributed: bool,
    ) -> None:
        w = _ipywidgets()
        self._views, self._menu, self._prompts, self._budget = views, menu, list(prompts), budget
        self._quiet = False
        self.view: View | None = None
        start = next(iter(menu))
        layers = list(menu[start])
        layer = layers[len(layers) // 2]
        wide, describing = w.Layout(width="98%"), {"description_width": "5em"}
        names = [(f"{i}: {_short(prompt)}", i - 1) for i, prompt in enumerate(self._prompts, start=1)]
        self.prompts = w.Dropdown(options=names, value=0, description="prompts", layout=wide, style=describing)
        self.typed = w.Textarea(description="prompt", continuous_update=False, rows=2, layout=wide, style=describing)
        self.kind = w.Dropdown(options=KINDS, description="as", style=describing)
        self.vector = w.Dropdown(options=list(menu), value=start, description="vector", style=describing)
        self.layer = w.Dropdown(options=layers, value=layer, description="layer", style=describing)
        own = menu[start][layer].alpha
        self.alpha = w.FloatSlider(
            value=own if own else min(0.1, max(alphas)),
            min=min(alphas),
            max=max(alphas),
            step=_step(alphas),
            readout_format="+.3f",
            description="alpha",
            continuous_update=False,
            layout=wide,
            style=describing,
        )
        self.attribute = w.Checkbox(value=attributed, description="score the prompt's tokens (slower)", indent=False)
        self.status, self.shown = w.HTML(), w.HTML(layout=wide)
        row = w.HBox([self.vector, self.layer, self.kind], layout=w.Layout(flex_flow="row wrap"))
        pick = [self.prompts] if len(self._prompts) > 1 else []
        self.box = w.VBox([*pick, self.typed, row, self.alpha, self.attribute, self.status, self.shown])
        self._before: list[Any] = []
        self._take_prompt()
        self.prompts.observe(self._on_prompts, names="value")
        self.vector.observe(self._on_vector, names="value")
        for widget in (self.typed, self.kind, self.layer, self.alpha, self.attribute):
            widget.observe(self._on_change, names="value")
        self.update()

    @property
    def prompt(self) -> Text:
        """The prompt that is set: text, or a conversation that ends with what was typed."""
        if self.kind.value == "text":
            return str(self.typed.value)
        return [*self._before, {"role": self._role, "content": str(self.typed.value)}]

    @property
    def steering(self) -> Steering:
        """The step that is set."""
        return at_alpha(self._menu[self.vector.value][self.layer.value], self.alpha.value)

    def update(self) -> None:
        """Compute what is set and show it; what cannot be computed is said there, and no error is raised."""
        self.status.value = html.note("computing ...")
        try:
            with settings(progress=False):
                self.view = self._views.view(self.prompt, self.steering, attributed=bool(self.attribute.value))
        except ValueError as error:
            self.view, self.shown.value = None, ""
            self.status.value = html.element("div", html.text(error), f"color:{html.TOWARD_REJECTED}")
            return
        self.shown.value = view_html(self.view, self._budget)
        self.status.value = html.note(self.steering.label)

    def _on_change(self, change: Any) -> None:
        if not self._quiet:
            self.update()

    def _on_prompts(self, change: Any) -> None:
        with self._at_once():
            self._take_prompt()

    def _on_vector(self, change: Any) -> None:
        """Another vector may have other layers; the same one stays where it is there too."""
        with self._at_once():
            layers, before = list(self._menu[self.vector.value]), self.layer.value
            self.layer.options = layers
            self.layer.value = before if before in layers else layers[len(layers) // 2]

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """Several widgets change, and one update follows."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
        self.update()

    def _take_prompt(self) -> None:
        """The prompt of the menu into the field; what was said before its last message is kept."""
        prompt = self._prompts[self.prompts.value]
        if isinstance(prompt, str):
            self._before, self._role = [], "user"
            self.kind.value, self.typed.value = "text", prompt
            return
        *self._before, last = prompt
        self._role = str(last.get("role", "user"))
        self.kind.value, self.typed.value = "chat", plain_text([last])

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        return f"Explorer({self.steering.label}; a notebook shows its menus)"


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise ImportError(
            "gr.explore in a notebook needs ipywidgets: pip install 'grains-tl[explore]'; without it, write a page: "
            "gr.explore(model, vectors, static='page.html')"
        ) from None
    return ipywidgets


def _short(prompt: Text) -> str:
    text = " ".join(plain_text(prompt).split())
    return text if len(text) <= 70 else text[:69] + "\N{HORIZONTAL ELLIPSIS}"


def _step(alphas: Sequence[float]) -> float:
    """A hundredth, or finer where the slider is short."""
    return min(0.01, (max(alphas) - min(alphas)) / 20)
