"""The project's own files agree with each other and with the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import grains_tl as gr

ROOT = Path(__file__).parents[2]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_citation_names_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gr.__version__
    (paper,) = citation["references"]
    assert paper["url"].endswith("2507.18043") and paper["authors"][0]["family-names"] == "Nguyen"


def test_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased" and gr.__version__ in headings


def test_the_repository_owner_is_named_in_one_file() -> None:
    naming = [
        path.relative_to(ROOT).as_posix()
        for path in tracked()
        if path.suffix not in {".png", ".safetensors", ".ipynb"}
        and path.is_file()
        and re.search(r"github\.com/[\w.-]+/grains[-_]tl", path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert naming == ["pyproject.toml"]


def test_ci_runs_the_documented_command() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]


def test_contributing_shows_the_layers_in_order() -> None:
    """The picture in CONTRIBUTING.md has the layers of pyproject.toml, top to bottom."""
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S | re.M)
    picture = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert layers is not None and picture is not None
    drawn = [re.split(r"  +", line)[0] for line in picture[1].splitlines()]
    assert drawn == re.findall(r'"(.*?)"', layers[1])


def test_exceptions_to_the_size_limits_are_still_needed() -> None:
    """Each file that pyproject.toml excuses still breaks the rule it is excused from."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    excused = re.findall(r'^"(grains_tl/[\w/]+\.py)" = \["(PLR0913|PLR0915|C901)"\]', text, re.M)
    limits = ["lint.pylint.max-args=9", "lint.pylint.max-statements=45", "lint.mccabe.max-complexity=12"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "PLR0913,PLR0915,C901", "grains_tl"]
    command += ["--output-format", "concise", *(part for limit in limits for part in ("--config", limit))]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    breaking = {tuple(hit) for hit in re.findall(r"^(\S+?):\d+:\d+: (\w+) ", found, re.M)}
    assert set(excused) == breaking
