"""Run settings hold inside their block alone, and bars behave in logs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import grains_tl as gr
from grains_tl._util.settings import current


def test_settings_hold_inside_their_block() -> None:
    before = current()
    with gr.settings(max_tokens=7):
        assert (current().max_tokens, current().progress) == (7, before.progress)
        with gr.settings(progress=False):
            assert (current().max_tokens, current().progress) == (7, False)
        assert current().progress == before.progress
    assert current() == before


def test_settings_end_with_an_exception() -> None:
    before = current()
    with pytest.raises(RuntimeError), gr.settings(max_tokens=3):
        raise RuntimeError
    assert current() == before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_bad_budgets_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens"), gr.settings(max_tokens=value):
        pass


def test_results_do_not_depend_on_the_budget(bridge: Any, pairs: list[gr.PreferencePair]) -> None:
    wanted = gr.score_pairs(bridge, pairs)
    with gr.settings(max_tokens=1):
        found = gr.score_pairs(bridge, pairs)
    assert found.flatten().tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-4)
    assert gr.score_pairs(bridge, pairs, max_tokens=1).tolist() == found.tolist()


JOB = """
import os, time
os.environ.pop("TQDM_DISABLE", None)
import grains_tl as gr
from grains_tl._util import progress
progress.DELAY = {delay}
def work():
    with progress.progress_bar(total=5, desc="outer") as bar:
        for _ in range(5):
            with progress.progress_bar(total=3, desc="inner") as inner:
                for _ in range(3):
                    time.sleep(0.02)
                    inner.update()
            bar.update()
with gr.settings(progress={shown}):
    work()
"""


@pytest.mark.parametrize(("delay", "shown", "n_lines"), [(0.1, True, 1), (60.0, True, 0), (0.1, False, 0)])
def test_a_bar_leaves_one_line_in_a_log(delay: float, shown: bool, n_lines: int) -> None:
    """Neither a line per step nor a line per inner bar; nothing for what is over at once or not wanted."""
    job = JOB.format(delay=delay, shown=shown)
    log = subprocess.run([sys.executable, "-c", job], capture_output=True, check=True).stderr
    lines = [line for line in log.replace(b"\r", b"\n").split(b"\n") if line.strip()]
    assert len(lines) == n_lines, log
    assert all(b"outer: 100%" in line for line in lines)
