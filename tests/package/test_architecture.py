"""The shape of the package: few public names, no name that is a function and a module at once, small functions and files."""

from __future__ import annotations

import ast
import graphlib
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import grains_tl as gr

NAMESPACES = [
    *(gr.attribution, gr.hooks, gr.baselines, gr.evaluate, gr.faithfulness, gr.analysis, gr.plotting),
    *(gr.hallucination, gr.records, gr.tokens, gr.inference, gr.models, gr.vectors, gr.finding, gr.exploring),
]

#: Namespaces whose job is many small tools may hold more than 22 names.
LARGER = {"grains_tl.analysis": 36, "grains_tl.plotting": 30}


def test_few_public_names() -> None:
    assert len(gr.__all__) <= 36
    assert len(set(gr.__all__)) == len(gr.__all__)


def test_top_level_modules() -> None:
    modules = [m.name for m in pkgutil.iter_modules(gr.__path__) if not m.ispkg]
    assert len(modules) < 8


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda n: n.__name__)
def test_namespaces(namespace: Any) -> None:
    functions = [name for name in namespace.__all__ if hasattr(namespace, name)]
    assert len(functions) == len(namespace.__all__) <= LARGER.get(namespace.__name__, 22)
    modules = {m.name for m in pkgutil.iter_modules(namespace.__path__)}
    shadowed = {
        name for name in namespace.__all__ if name in modules and not hasattr(getattr(namespace, name), "__path__")
    }
    assert shadowed <= {"harness", "export"}, "a name that is a function and a module at once"


ROOT = Path(gr.__file__).parent
N_PARAMETERS, N_BODY_LINES, N_FILE_LINES = 10, 60, 300


def functions() -> Iterator[ast.FunctionDef]:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield node


def test_few_parameters() -> None:
    """All that can be named in a call; ``**run`` and other documented options are one more."""
    counts: dict[str, int] = {}
    for node in functions():
        named = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        counts[node.name] = max(counts.get(node.name, 0), len(named))
    assert not {name: n for name, n in counts.items() if n > N_PARAMETERS}
    assert sum(n == N_PARAMETERS for n in counts.values()) <= 4, "those with ten get fewer, and no more of them"


def test_short_bodies() -> None:
    """Lines from the first statement after the docstring to the last."""
    too_long = {}
    for node in functions():
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0
        if lines > N_BODY_LINES:
            too_long[node.name] = lines
    assert not too_long


def test_short_files() -> None:
    lines = {
        p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.rglob("*.py")
    }
    assert not {name: n for name, n in lines.items() if n > N_FILE_LINES}


# -- cycles -----------------------------------------------------------------------------------------------------------


def imported(module: str, modules: dict[str, ast.Module]) -> set[str]:
    """Modules of the package that a module imports anywhere, inside functions and under ``TYPE_CHECKING`` too."""
    found: set[str] = set()
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            places = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {place if place in modules else node.module for place in places}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in modules and name != module}


def cycle_in(modules: dict[str, ast.Module]) -> list[str]:
    try:
        graphlib.TopologicalSorter({name: imported(name, modules) for name in modules}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def parsed(paths: Iterable[Path], root: Path) -> dict[str, ast.Module]:
    names = {path: ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for path, name in names.items()}


def test_no_modules_import_each_other() -> None:
    """import-linter looks at packages; within one, an import inside a function can hide a cycle. There are no exceptions."""
    assert cycle_in(parsed(ROOT.rglob("*.py"), ROOT)) == []


def test_cycles_are_found() -> None:
    sources = {
        "p.a": "from p import b",
        "p.b": "def f():\n    from p.c import x",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a",
        "p": "",
    }
    modules = {name: ast.parse(text) for name, text in sources.items()}
    assert set(cycle_in(modules)) == {"p.a", "p.b", "p.c"}
    assert cycle_in({name: tree for name, tree in modules.items() if name != "p.c"}) == []
