"""A report full of hostile text, opened in a real browser that reaches no network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grains_tl.demo.text_report import write_report
from tests.demo.test_report import EVIL, fake_set, poisoned

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: Would each leave a mark on the page if it ran.
ACTS = (
    "<script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">",
    "<svg onload=\"document.title='OWNED'\">",
    "\x00\x07\x1b[31m\u202e\ufeff",
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_hostile_prompts_are_only_text(tmp_path: Path) -> None:
    one = poisoned(fake_set())
    one["continuations"] += [{"prompt": "".join(ACTS), "alpha": 0.2, "text": "".join(ACTS)}]
    one["tokens"][0]["tokens"][0] = "".join(ACTS)
    one["verdict"] += "".join(ACTS)
    results = {"settings": {"model": ACTS[0]}, "versions": {ACTS[1]: ACTS[2]}, "seconds": 1.0, "sets": [one]}
    path = write_report(results, tmp_path)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    # no host has an address: whatever the page asks for fails
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1000,3000", "--virtual-time-budget=3000"]
    picture = Path(os.environ.get("GRAINS_TL_SCREENSHOT", tmp_path / "page.png"))
    options = [f"--screenshot={picture}", "--dump-dom"]
    done = [subprocess.run([*command, o, path.as_uri()], capture_output=True, text=True, timeout=180) for o in options]
    dom = done[1].stdout
    assert "<title>grains_tl report</title>" in dom and "<title>OWNED" not in dom
    assert dom.count(EVIL[0].replace("<", "&lt;").replace(">", "&gt;")) > 5
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (3000, 1000) and 0.001 < (pixels < 128).mean() < 0.5  # words on a page, not a blank one
