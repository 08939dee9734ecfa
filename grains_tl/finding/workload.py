"""Made-up work of a given size: records of random tokens, and the builds and the sweep that would be run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from grains_tl._util.checks import whole
from grains_tl._util.errors import OptionError
from grains_tl.attribution.methods import METHODS
from grains_tl.attribution.result import Attribution
from grains_tl.attribution.selection import Selection
from grains_tl.evaluate.measuring import measure
from grains_tl.evaluate.settings import grid
from grains_tl.models.shapes import N_WORDS
from grains_tl.tokens.images import ImageInputs
from grains_tl.tokens.pairs import TokenizedPair
from grains_tl.tokens.patches import ImageSpan
from grains_tl.types import BridgeModel
from grains_tl.vectors.building import BuildingRecords
from grains_tl.vectors.grains import Grains
from grains_tl.vectors.recipes import recipe_of
from grains_tl.vectors.steering_vectors import SteeringVectors

#: Builds by what they are called in a plan: recipes by their names, and attribution methods of the ``grains`` recipe.
RECIPE_BUILDS = ("margin_gradient", "caa")

#: What is planned unless something else is asked for.
USUAL_JOBS = ("leave_one_out", "integrated_gradients", "gradient_x_input", *RECIPE_BUILDS, "sweep")

#: All that can be planned.
ALL_JOBS = (*METHODS, *RECIPE_BUILDS, "sweep")


@dataclass(frozen=True)
class BothSides(Grains):
    """The recipe with tokens on both sides in every record, whatever their scores: the usual case, and the most work."""

    @override
    def select(self, attributions: Sequence[Attribution]) -> list[Selection]:
        k = self.top_k.k
        content = [a.content.nonzero().flatten().tolist() for a in attributions]
        return [Selection(tuple(own[:k]), tuple(own[k : 2 * k])) for own in content]


@dataclass(frozen=True)
class Workload:
    """How much is to be done; all records are of one size.

    Attributes:
        records: building records, which the sweep measures too.
        prompt_tokens: text tokens of a prompt.
        response_tokens: tokens of either response.
        image_tokens: tokens of one picture in front of the text (Qwen2.5-VL: a square number).
        steps: gradients per record, for the methods that take steps.
        alphas: step sizes of the sweep, which goes over all layers.

    Examples:
        >>> Workload(records=100).prompt_tokens
        60
    """

    records: int = 50
    prompt_tokens: int = 60
    response_tokens: int = 8
    image_tokens: int = 0
    steps: int = 20
    alphas: int = 2

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 5, "image_tokens": 0}  # two tokens are masked on either side
        for name in self.__dataclass_fields__:
            whole(name, getattr(self, name), least.get(name, 1))

    @property
    def longest(self) -> int:
        """Tokens of the longest input row."""
        frame = self.image_tokens and self.image_tokens + 2
        return self.prompt_tokens + frame + self.response_tokens - 1

    def records_for(self, config: Any) -> list[TokenizedPair]:
        """The records, of random tokens.

        Args:
            config: the model's, for the ids around a picture.

        Returns:
            One per record, as ``tokenize_pairs`` would make them.
        """
        draw = torch.Generator().manual_seed(0)
        size = min(N_WORDS, int(config.get_text_config().vocab_size))

        def words(n: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, size, (n,), generator=draw).tolist())

        records = []
        for number in range(self.records):
            prompt, images = (1, *words(self.prompt_tokens - 1)), None
            if self.image_tokens:
                images = self._picture(config, number, draw)
                picture = [config.image_token_id] * self.image_tokens
                prompt = (1, config.vision_start_token_id, *picture, config.vision_end_token_id, *prompt[1:])
            # the first tokens of the responses differ, or the border would be elsewhere
            chosen, rejected = ((first, *words(self.response_tokens - 1)) for first in (3, 4))
            content = (False, *[True] * (len(prompt) - 1))
            records.append(TokenizedPair(prompt, chosen, rejected, content, tuple(map(str, prompt)), images=images))
        return records

    def _picture(self, config: Any, number: int, draw: torch.Generator) -> ImageInputs:
        n = self.image_tokens
        side = round(n**0.5)
        if config.model_type != "qwen2_5_vl" or side**2 != n:
            raise OptionError(
                f"image_tokens={n} for {config.model_type}; pictures are planned for qwen2_5_vl, with a square number of "
                "tokens. For other models count them among prompt_tokens"
            )
        tower = config.vision_config
        merge = int(tower.spatial_merge_size)
        width = int(tower.in_channels) * int(tower.temporal_patch_size) * int(tower.patch_size) ** 2
        is_image = (False, False, *[True] * n, False, *[False] * (self.prompt_tokens - 1))
        return ImageInputs(
            inputs={
                "pixel_values": torch.randn(n * merge**2, width, generator=draw),
                "image_grid_thw": torch.tensor([[1, side * merge, side * merge]]),
            },
            token_inputs={"mm_token_type_ids": tuple(map(int, is_image))},
            is_image=is_image,
            spans=(ImageSpan(start=2, length=n, rows=side, cols=side),),
            images=(),
            text="",
            digest=str(number),
        )

    def jobs(self, model: BridgeModel, config: Any) -> dict[str, Callable[[], Any]]:
        """Everything that can be planned.

        Args:
            model: what it runs on.
            config: the model's.

        Returns:
            Functions without arguments, by their names in ``ALL_JOBS``.
        """
        n_layers = int(model.cfg.n_layers)
        tokenized = self.records_for(config)

        def build(recipe: str, **options: Any) -> Callable[[], Any]:
            made = BothSides.of(**options) if recipe == "grains" else recipe_of(recipe, **options)
            return lambda: made.build(BuildingRecords(model, tokenized, tuple(range(n_layers))))

        def sweep() -> Any:
            vectors = random_vectors(model)
            vectors.require_match(model)  # as a sweep does first, with a few tokens
            alphas = [0.1 * (i + 1) for i in range(self.alphas)]
            return measure(model, tokenized, grid(vectors, alphas=alphas))

        builds = {name: build("grains", method=name, **self._options(name)) for name in METHODS}
        return {**builds, **{name: build(name) for name in RECIPE_BUILDS}, "sweep": sweep}

    def _options(self, method: str) -> dict[str, Any]:
        """Steps that are all taken; adaptive nodes stop earlier where they can."""
        known = METHODS[method].field_names()
        fixed = {"n_steps": self.steps, "nodes": "gauss_legendre"}
        return {name: value for name, value in fixed.items() if name in known}


def random_vectors(model: BridgeModel) -> SteeringVectors:
    """One random direction per layer; steering with it costs what any other does."""
    shape = (int(model.cfg.n_layers), int(model.cfg.d_model))
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SteeringVectors.from_raw(raw, range(shape[0]), torch.full(shape[:1], 50.0))
