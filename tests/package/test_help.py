"""``help`` of every public name: what it is, each argument, shapes or units, errors, the paper, an example.

That the examples run is tested in ``test_shows`` (doctests of every room).
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
import types
from typing import Any

import pytest

import grains_tl as gr

PLACES = (
    gr,
    *(gr.analysis, gr.attribution, gr.baselines, gr.evaluate, gr.faithfulness, gr.hooks, gr.inference, gr.models),
    *(gr.plotting, gr.records, gr.tokens, gr.vectors),
)
PUBLIC = {
    name: getattr(place, name)
    for place in PLACES
    for name in place.__all__
    if callable(getattr(place, name)) and not isinstance(getattr(place, name), types.ModuleType)
}
FUNCTIONS = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)]
#: Functions that follow a paper, and a mark of it in their help.
PAPERS = {
    "attribute": "2507.18043",
    "build_vectors": "2507.18043",
    "interpolate_hook": "1703.01365",
    "reduce_vectors": "2507.18043",
    "collect_differences": "2507.18043",
    "select_tokens": "2507.18043",
    "steer_hook": "2507.18043",
    "caa_differences": "2312.06681",
    "baseline_vectors": "2312.06681",
    "head_vectors": "2306.03341",
    "lora_adapter": "2106.09685",
    "curves": "1806.07421",
    "random_weights_check": "1810.03292",
    "mc1": "2109.07958",
    "mc2": "2109.07958",
    "orthogonal_direction_vectors": "2602.06801",
}
#: What shows that tensors and numbers have a shape or a unit.
MEASURE = re.compile(
    r"``\[[^\]]*\]``|nats|no unit|unit length|residual units|residual norm|shares?\b|fraction|inches|seconds|cosine|"
    r"correlation|AUC|rate\b"
)
NUMBERS = re.compile(r"Tensor|DataFrame|float|Float|Series|Differences|SteeringVectors|Attribution|Curves")


MEASURED = [name for name in FUNCTIONS if NUMBERS.search(str(inspect.signature(PUBLIC[name]).return_annotation))]


def help_of(name: str) -> str:
    return inspect.getdoc(PUBLIC[name]) or ""


def raised_in(thing: Any) -> set[str]:
    """Names of the errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    calls = [n.exc.func for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    return {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("name", PUBLIC)
def test_help_begins_with_a_summary(name: str) -> None:
    first, *rest = help_of(name).split("\n")
    assert len(first) > 20 and first.endswith((".", "?", ":")), first
    assert not rest or rest[0] == "", "the summary is one line"


@pytest.mark.parametrize("name", PUBLIC)
def test_help_has_an_example(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(help_of(name))
    assert examples, f"{name} has no example"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_names_every_argument(name: str) -> None:
    text = help_of(name)
    prose = text.split("Examples:")[0]
    missing = [p for p in inspect.signature(PUBLIC[name]).parameters if not re.search(rf"\b{p}\b", prose)]
    assert not missing, missing


@pytest.mark.parametrize("name", MEASURED)
def test_help_gives_shapes_or_units(name: str) -> None:
    assert MEASURE.search(help_of(name).split("Examples:")[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_names_the_errors_that_are_raised(name: str) -> None:
    raises = help_of(name).partition("Raises:")[2]
    missing = [error for error in raised_in(PUBLIC[name]) if error not in raises]
    assert not missing, missing


@pytest.mark.parametrize("name", PAPERS)
def test_help_names_its_paper(name: str) -> None:
    assert PAPERS[name] in help_of(name)
