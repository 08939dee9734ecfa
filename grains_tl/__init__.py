"""GrAInS on TransformerLens hook points: which tokens cause a behaviour, which direction carries it, does it steer.

The story, in order: ``load_model`` and ``load_pairs``; ``attribute``; ``build_vectors``; ``vectors.hooks``; measure with
``sweep``, ``choose`` and ``report_choice``. The names used most are here; the rest is grouped in ``gr.attribution``,
``gr.hooks``, ``gr.baselines``, ``gr.evaluate``, ``gr.faithfulness``, ``gr.analysis``, ``gr.export``, ``gr.plotting`` and
``gr.hallucination``. Everything loads on first use, so importing the package is quick.
"""

from typing import Any

import lazy_loader

from grains_tl._renamed import forward

__version__ = "0.1.0"

#: In the order of the story: load, find the tokens, build, steer, measure, look.
__all__ = [
    "Attribution",
    "Choice",
    "MultipleChoice",
    "PreferencePair",
    "SteeringVectors",
    "analysis",
    "attribute",
    "attribution",
    "baselines",
    "build_vectors",
    "check_model",
    "choose",
    "compare_attributions",
    "compare_with_controls",
    "evaluate",
    "export",
    "faithfulness",
    "generate",
    "hallucination",
    "hooks",
    "load_bundled",
    "load_model",
    "load_pairs",
    "load_vectors",
    "plotting",
    "report_choice",
    "score_pairs",
    "settings",
    "show_tokens",
    "split_records",
    "sweep",
]

_lazy, __dir__, _ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _lazy(name)
    except AttributeError:
        return forward(__name__, name)
