"""``python -m grains_tl``: the command line."""

import sys

from grains_tl.cli import main

sys.exit(main())
