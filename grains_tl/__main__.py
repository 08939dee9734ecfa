"""``python -m grains_tl``: the command line."""

from __future__ import annotations

import sys

from grains_tl.cli.main import main

sys.exit(main())
