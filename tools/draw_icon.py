"""Draws the page's icon: `python -m tools.draw_icon` writes minigpt4/web/page/assets/icon.png.

The same rounded square as beside the page's name, its colours turning about the middle, and a
picture's mountains and sun in it.
"""

import numpy as np
from PIL import Image, ImageDraw

from minigpt4.web.page.parts import ASSETS

SIDE = 256
COLOURS = np.array([[15, 107, 98], [85, 201, 186], [240, 185, 91], [15, 107, 98]], float)


def draw() -> Image.Image:
    """The icon [SIDE, SIDE], RGBA."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    turned = (np.degrees(np.arctan2(x, -y)) - 210) % 360 / 120  # 0 to 3: from colour to colour
    colours = np.stack([np.interp(turned, range(4), c) for c in COLOURS.T], axis=-1)
    icon = Image.fromarray(colours.round().astype(np.uint8)).convert("RGBA")
    icon.putalpha(_mask(lambda d, s: d.rounded_rectangle((0, 0, s - 1, s - 1), s * 0.23, fill=255)))
    white = Image.new("RGBA", icon.size, "white")
    icon.paste(white, mask=_mask(_draw_picture))
    return icon


def _draw_picture(drawing: ImageDraw.ImageDraw, side: int) -> None:
    def at(*shares: float) -> list[float]:
        return [share * side for share in shares]

    drawing.ellipse(at(0.24, 0.24, 0.40, 0.40), fill=255)
    drawing.polygon(at(0.14, 0.78, 0.40, 0.50, 0.53, 0.64, 0.68, 0.44, 0.86, 0.78), fill=255)


def _mask(shape) -> Image.Image:
    """Drawn four times as large, for smooth edges."""
    large = Image.new("L", (4 * SIDE, 4 * SIDE))
    shape(ImageDraw.Draw(large), 4 * SIDE)
    return large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(ASSETS / "icon.png", optimize=True)
