"""``help`` of public names, where ruff's ``D`` and the doctests do not look.

pydoclint compares documented arguments and results with the signatures. Here: shapes or
units, errors, the paper, an example. That the examples run is tested in ``test_shows``.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

import grains_tl as gr

ROOT = Path(__file__).parents[2]
PLACES = (
    gr,
    *(
        gr.analysis,
        gr.attribution,
        gr.baselines,
        gr.evaluate,
        gr.exploring,
        gr.faithfulness,
        gr.finding,
        gr.hallucination,
        gr.hooks,
        gr.inference,
    ),
    *(gr.models, gr.plotting, gr.records, gr.tokens, gr.vectors),
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
    """Names of the errors that a function's own body raises; functions inside it are left out."""
    found, todo = set(), list(ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0].body)  # type: ignore[attr-defined]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        if not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def test_arguments_and_results_are_documented(tmp_path: Path) -> None:
    """pydoclint on the public functions and classes alone; internal ones may do with prose."""
    sources = {inspect.getsource(inspect.unwrap(thing)) for thing in PUBLIC.values()}
    public = tmp_path / "public.py"
    public.write_text("\n\n".join(sorted(sources)), encoding="utf-8")
    command = [sys.executable, "-m", "pydoclint.main", "--config", str(ROOT / "pyproject.toml"), str(public)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", PUBLIC)
def test_help_has_an_example(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(help_of(name))
    assert examples, f"{name} has no example"


@pytest.mark.parametrize("name", MEASURED)
def test_help_gives_shapes_or_units(name: str) -> None:
    assert MEASURE.search(help_of(name).split("Examples:")[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_names_the_errors_that_are_raised(name: str) -> None:
    raises = help_of(name).partition("Raises:")[2]
    # both are ValueErrors, and callers need not know which
    kinds = {"OptionError": "ValueError", "RecordError": "ValueError"}
    missing = [e for e in raised_in(PUBLIC[name]) if e not in raises and kinds.get(e, e) not in raises]
    assert not missing, missing


@pytest.mark.parametrize("name", PAPERS)
def test_help_names_its_paper(name: str) -> None:
    assert PAPERS[name] in help_of(name)
