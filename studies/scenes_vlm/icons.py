"""Draw the ten icons of the scenes from DejaVu Sans, which comes with matplotlib: ``python -m studies.scenes_vlm.icons``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

import grains_tl
from grains_tl.models._object_scenes import CELL, ICONS


def draw(path: Path) -> None:
    """Write a strip of white-on-black icons, one cell each, centred."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 96)
    strip = Image.new("L", (CELL * len(ICONS), CELL))
    for i, glyph in enumerate(ICONS.values()):
        left, top, right, bottom = font.getbbox(glyph)
        icon = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(icon).text((-left, -top), glyph, font=font, fill=255)
        icon.thumbnail((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
        strip.paste(icon, (i * CELL + (CELL - icon.width) // 2, (CELL - icon.height) // 2))
    strip.save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(grains_tl.__file__).parent / "data_files" / "scenes_vlm" / "icons.png")
