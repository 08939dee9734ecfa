"""How large the text demo is, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from grains_tl.hooks.mask import Masker

ABOUT = {
    "sentiment": "Mixed reviews: one good and one bad detail, then the verdict. Chosen is a favourable completion, "
    "rejected an unfavourable one. Built on restaurants, hotels, cafes and travel; tested on films, phones, clothes "
    "and courses.",
    "misconceptions": "Questions with a popular wrong answer. Chosen is the correct sentence, rejected the "
    "misconception. Built on biology, the body, physics and food; tested on space, history, language and technology.",
}

#: Beginnings of texts in which the behaviour of a set can be seen; prompts of records often leave room for one word only.
OPEN_PROMPTS = {
    "sentiment": ("All in all, the film was", "We stayed at this hotel for a week and"),
}

#: At most so many records of a set: whole sentences as responses cost several times as much as single words.
AT_MOST = {
    "sentiment": {"build": 48, "choose": 24, "test": 104, "draws": 30},
    "misconceptions": {"build": 24, "choose": 12, "test": 40, "draws": 10},
}


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is.

    Attributes:
        sets: which bundled preference sets.
        n_build: records to build on (at most ``AT_MOST``).
        n_choose: records to choose the layer on.
        n_test: records to measure on.
        n_test_draws: test records the many draws are measured on.
        n_draws: draws of random tokens, and bootstrap resamples.
        n_control_draws: draws of each of ``controls``.
        controls: besides random tokens, keys of ``one_set.CONTROLS``.
        n_cost: test records for the curve of effect against cost; 0 leaves it out.
        n_neutral: neutral texts the cost is measured on.
        kl: nats per token, where effects are compared at equal cost.
        methods: attributions to compare, with their number of path steps.
        layers: candidate layers of the sweep; of a model that has none of them, three of its own.
        alpha: step of the sweep and of the comparison, fraction of the layer's typical residual norm.
        alphas: of the cost curve, and candidates for the continuations: the largest whose KL stays under ``max_kl``.
        max_kl: nats, mean KL of the next-token distribution on the choosing split.
        top_k: tokens masked on each side.
        masker: what replaces a masked token.
        spare_end: keep the prompt's last token, where the residual is read, out of the selections.
        seed: of all draws and of the choice of records.
    """

    sets: tuple[str, ...] = ("sentiment", "misconceptions")
    n_build: int = 48
    n_choose: int = 24
    n_test: int = 104
    n_test_draws: int = 30
    n_draws: int = 20
    n_control_draws: int = 10
    controls: tuple[str, ...] = ("random direction", "orthogonal direction", "shuffled labels")
    n_cost: int = 16
    n_neutral: int = 8
    kl: float = 0.05
    methods: tuple[tuple[str, int], ...] = (
        ("leave_one_out", 1),
        ("integrated_gradients", 16),
        ("gradient_x_input", 1),
    )
    layers: tuple[int, ...] = (6, 9, 12, 15, 18, 21, 24, 27)
    alpha: float = 0.2
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    max_kl: float = 0.5
    top_k: int = 2
    masker: Masker = "mean_embedding"
    spare_end: bool = False
    seed: int = 0
