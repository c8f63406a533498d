"""Composes the evaluation suite's emoji pictures as suite.jsonl says: `python -m
tools.compose_suite`.

The emoji are those of Noto Color Emoji (Debian: fonts-noto-color-emoji; SIL Open Font License 1.1).
Only this program needs the font.
"""

import json
import math
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from minigpt4.evaluation.suite import SUITE
from tools.draw_abilities import HEIGHT, SCALE, WIDTH, Canvas

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the one at which it has its pictures


def table() -> Canvas:
    """A wooden table with a white plate, from above."""
    c = Canvas("#b98a5e", "#a5744a")
    for y in range(40, HEIGHT, 80):
        c.line((0, y), (WIDTH, y + 6), colour="#94653d", width=3)
    c.disc(320, 275, 215, "#d8d2c8", 170)
    c.disc(320, 268, 210, "#ffffff", 165)
    c.disc(320, 268, 160, "#f1f1ee", 122)
    return c


def studio() -> Canvas:
    """A plain backdrop with a round shadow on the floor."""
    c = Canvas("#f4f1ea", "#dcd6ca")
    c.disc(320, 415, 190, "#c9c2b4", 26)
    return c


def meadow() -> Canvas:
    """Green hills under a blue sky."""
    c = Canvas("#79c2ef", "#e4f5fb")
    c.hills(330, 40, 2, "#8cc46a", 0.6)
    c.hills(380, 26, 1.4, "#6fae4e", 2)
    return c


def sea() -> Canvas:
    """The sea behind a beach."""
    c = Canvas("#86cdf2", "#e9f7fb")
    c.box(0, 240, WIDTH, 160, "#2f8fc4")
    for i in range(14):
        x, y = (i * 151) % WIDTH, 258 + (i * 37) % 120
        c.line((x, y), (x + 46, y), colour="#6fb9dd", width=3)
    c.box(0, 385, WIDTH, 95, "#f0d9a0")
    return c


def lake() -> Canvas:
    """A lake before a green shore."""
    c = Canvas("#8fcbee", "#eef8fb")
    c.hills(290, 20, 1.6, "#7db45f", 1)
    c.box(0, 310, WIDTH, 170, "#4f9fcb")
    for i in range(12):
        x, y = (i * 167) % WIDTH, 330 + (i * 41) % 130
        c.line((x, y), (x + 60, y), colour="#83bfe0", width=3)
    return c


def desert() -> Canvas:
    """Dunes under a hot sky."""
    c = Canvas("#f7c873", "#fdebc0")
    c.hills(340, 30, 2, "#e0ab5c", 0.3)
    c.hills(390, 22, 1.5, "#d29a4a", 2.2)
    return c


def snow() -> Canvas:
    """Snow, and more of it in the air."""
    c = Canvas("#a9c8dd", "#e6f0f6")
    c.hills(350, 24, 1.6, "#f7fbfd", 0.5)
    for i in range(60):
        c.disc((i * 97) % WIDTH, (i * 59) % 340, 3 + i % 3, "#ffffff")
    return c


def night() -> Canvas:
    """A starry sky over dark ground."""
    c = Canvas("#101a3a", "#3a4a7c")
    for i in range(70):
        c.disc((i * 89) % WIDTH, (i * 53) % 330, 1 + i % 2, "#f5edc8")
    c.hills(400, 20, 1.5, "#1d2a3a", 0.9)
    return c


def street() -> Canvas:
    """Houses, and a road with a pedestrian crossing."""
    c = Canvas("#9fd0ee", "#e8f5fa")
    for i, x in enumerate(range(0, WIDTH, 110)):
        top = 90 + 40 * (i % 3)
        c.box(x, top, 104, 300, ("#c98f6b", "#b9a37e", "#a9785c")[i % 3])
        for y in range(top + 24, 260, 52):
            for dx in (16, 62):
                c.box(x + dx, y, 26, 32, "#e9f2f6")
    c.box(0, 310, WIDTH, 170, "#6b7078")
    for x in range(40, WIDTH, 110):
        c.shape((x, 400), (x + 56, 400), (x + 44, 470), (x - 16, 470), colour="#f3f3f0")
    return c


def room() -> Canvas:
    """A wall with a window, and a wooden floor."""
    c = Canvas("#f2e7d5", "#eaddc6")
    c.box(60, 60, 150, 130, "#ffffff", 6)
    c.box(70, 70, 130, 110, "#a9d8f2", 4)
    c.line((135, 70), (135, 180), colour="#ffffff", width=7)
    c.box(0, 370, WIDTH, 110, "#b07f55")
    for y in (398, 428, 458):
        c.line((0, y), (WIDTH, y), colour="#996a44", width=3)
    return c


BACKGROUNDS: dict[str, Callable[[], Canvas]] = {
    make.__name__: make
    for make in (table, studio, meadow, sea, lake, desert, snow, night, street, room)
}


@cache
def emoji(character: str) -> Image.Image:
    """The font's picture of one character, cut to what is drawn."""
    font = ImageFont.truetype(FONT, FONT_SIZE)
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).text((10, 10), character, font=font, embedded_color=True)
    return picture.crop(picture.getbbox())


def place(canvas: Canvas, character: str, x: int, y: int, size: int) -> None:
    """Put an emoji on the picture, its longer side `size`, its middle at (x, y)."""
    picture = emoji(character.removesuffix("<"))
    if character.endswith("<"):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size * SCALE / max(picture.size)
    picture = picture.resize([math.ceil(side * scale) for side in picture.size])
    corner = (x * SCALE - picture.width // 2, y * SCALE - picture.height // 2)
    canvas.image.paste(picture, corner, picture)


def compose(background: str, things: str) -> Canvas:
    """The picture. things: of each the emoji ("<" behind it: mirrored), its middle's x
    and y and its longer side."""
    canvas = BACKGROUNDS[background]()
    words = things.split()
    for at in range(0, len(words), 4):
        place(canvas, words[at], *map(int, words[at + 1 : at + 4]))
    return canvas


def main() -> None:
    """Draw the picture of each line of suite.jsonl that says how."""
    for line in (SUITE / "suite.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "things" in record:
            compose(record["background"], record["things"]).save(SUITE / record["image"])


if __name__ == "__main__":
    main()
