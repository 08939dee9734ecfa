"""GrAInS on TransformerLens hook points: which tokens cause a behaviour, which direction carries it, does it steer.

The story, in order: ``load_model`` and ``load_pairs``; ``attribute``; ``build_vectors``; ``vectors.hooks``; measure with
``sweep``, ``choose`` and ``report_choice``. ``find_vector`` does all of it in one call, and ``audit`` judges a vector that
you were given. The names used most are here; the rest is grouped in ``gr.attribution``, ``gr.vectors``,
``gr.hooks``, ``gr.baselines``, ``gr.evaluate``, ``gr.faithfulness``, ``gr.analysis``, ``gr.export``, ``gr.plotting`` and
``gr.hallucination``. Everything loads on first use, so importing the package is quick.
"""

from typing import Any

import lazy_loader

from grains_tl._renamed import forward

__version__ = "0.1.0"

#: In the order of the story: load, find the tokens, build, steer, measure, look.
__all__ = [  # noqa: RUF022
    "load_model",
    "wrap_model",
    "check_model",
    "load_pairs",
    "load_bundled",
    "PreferencePair",
    "MultipleChoice",
    "split_records",
    "attribute",
    "Attribution",
    "compare_attributions",
    "show_tokens",
    "build_vectors",
    "Mask",
    "SteeringVectors",
    "Steering",
    "load_vectors",
    "generate",
    "settings",
    "score_pairs",
    "sweep",
    "choose",
    "Choice",
    "report_choice",
    "compare_with_controls",
    "find_vector",
    "audit",
    "explore",
    "attribution",
    "hooks",
    "baselines",
    "evaluate",
    "analysis",
    "export",
    "plotting",
    "hallucination",
]

_lazy, __dir__, _ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _lazy(name)
    except AttributeError:
        return forward(__name__, name)
