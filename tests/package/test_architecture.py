"""The shape of the package: few public names, no name that is a function and a module at once, light imports."""

from __future__ import annotations

import pkgutil
from typing import Any

import pytest

import grains_tl as gr

NAMESPACES = [
    *(gr.attribution, gr.hooks, gr.baselines, gr.evaluate, gr.faithfulness, gr.analysis, gr.plotting),
    *(gr.hallucination, gr.records, gr.tokens, gr.inference, gr.models, gr.vectors, gr.finding, gr.exploring),
]


def test_few_public_names() -> None:
    assert len(gr.__all__) <= 36
    assert len(set(gr.__all__)) == len(gr.__all__)


def test_top_level_modules() -> None:
    modules = [m.name for m in pkgutil.iter_modules(gr.__path__) if not m.ispkg]
    assert len(modules) < 8


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda n: n.__name__)
def test_namespaces(namespace: Any) -> None:
    functions = [name for name in namespace.__all__ if hasattr(namespace, name)]
    assert len(functions) == len(namespace.__all__) <= 22
    modules = {m.name for m in pkgutil.iter_modules(namespace.__path__)}
    shadowed = {
        name for name in namespace.__all__ if name in modules and not hasattr(getattr(namespace, name), "__path__")
    }
    assert shadowed <= {"harness", "export"}, "a name that is a function and a module at once"
