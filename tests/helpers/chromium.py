"""Pages as a browser shows them, where Chromium is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium to open the page")


def opened(page: Path, fragment: str = "", *, flags: tuple[str, ...] = ("--dump-dom",)) -> str:
    """What Chromium prints for a page, by default the document after its scripts have run; no network is there.

    Args:
        page: the file.
        fragment: behind the address's ``#``.
        flags: what to do with the page.
    """
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        command += ["--proxy-server=127.0.0.1:9", "--virtual-time-budget=2000", *flags]  # nothing listens there
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
        address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout
