"""``grains-tl lm-eval``: lm-evaluation-harness' own command, which knows the model ``grains_tl`` then."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run_lm_eval(arguments: Sequence[str]) -> int:
    """``lm_eval`` with these arguments; ``--model grains_tl`` is this package.

    Raises:
        ImportError: lm-eval is not installed.
    """
    from grains_tl.evaluate.harness import register

    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
