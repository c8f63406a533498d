"""Draws a picture for each of the paper's abilities: `python -m tools.draw_abilities`."""

import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from minigpt4.evaluation.suite import SUITE

WIDTH, HEIGHT, SCALE = 640, 480, 2  # drawn larger, then scaled down: smooth edges
Point = tuple[float, float]


class Canvas:
    """ImageDraw in the picture's own coordinates."""

    def __init__(self, top: str, bottom: str) -> None:
        self.image = Image.new("RGB", (1, 2))
        self.image.putpixel((0, 0), _rgb(top))
        self.image.putpixel((0, 1), _rgb(bottom))
        size = (WIDTH * SCALE, HEIGHT * SCALE)
        self.image = self.image.resize(size, Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))
        self.draw = ImageDraw.Draw(self.image)

    def disc(self, x: float, y: float, rx: float, colour: str, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        box = [SCALE * v for v in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.ellipse(box, fill=colour)

    def shape(self, *points: Point, colour: str) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=colour)

    def box(self, x: float, y: float, w: float, h: float, colour: str, radius: float = 0) -> None:
        box = [SCALE * v for v in (x, y, x + w, y + h)]
        self.draw.rounded_rectangle(box, radius * SCALE, fill=colour)

    def line(self, *points: Point, colour: str, width: float = 3) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=int(width * SCALE), joint="curve")

    def arc(self, x: float, y: float, r: float, a: int, b: int, colour: str, width: float) -> None:
        box = [SCALE * v for v in (x - r, y - r, x + r, y + r)]
        self.draw.arc(box, a, b, fill=colour, width=int(width * SCALE))

    def hills(
        self, base: float, height: float, waves: float, colour: str, phase: float = 0
    ) -> None:
        points = [
            (x, base - height * math.sin(phase + waves * x / WIDTH * math.pi))
            for x in range(0, WIDTH + 8, 8)
        ]
        self.shape((0, HEIGHT), *points, (WIDTH, HEIGHT), colour=colour)

    def save(self, path: Path) -> None:
        """Write the picture."""
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        small.save(path, quality=82, optimize=True)


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def describe() -> Canvas:
    """A red house by a lake, with a tree and a rowing boat."""
    c = Canvas("#7fc4ee", "#e8f6fb")
    c.disc(530, 90, 44, "#ffd45c")
    for x, y in ((120, 80), (330, 110)):
        for dx, r in ((-34, 20), (0, 30), (34, 22)):
            c.disc(x + dx, y, r, "#ffffff")
    c.hills(300, 60, 2.2, "#7da9a0")
    c.hills(330, 30, 3, "#6aa84f", 1)
    c.box(0, 370, WIDTH, 110, "#3f88b5")
    for y in range(385, 480, 18):
        c.line((40 + y % 60, y), (190 + y % 60, y), colour="#6fb0d2", width=2)
        c.line((380 + y % 50, y + 6), (560 + y % 50, y + 6), colour="#6fb0d2", width=2)
    c.box(210, 225, 170, 125, "#b5382c")
    c.shape((190, 232), (295, 150), (400, 232), colour="#5a3a2e")
    c.box(345, 160, 24, 50, "#6b4a3d")
    for x in (232, 322):
        c.box(x, 255, 36, 38, "#ffffff")
        c.box(x + 4, 259, 28, 30, "#9fd4ee")
    c.box(280, 285, 32, 65, "#f3e3c2")
    c.box(470, 230, 18, 130, "#7a5230")
    for x, y, r in ((480, 190, 58), (440, 225, 40), (520, 225, 42)):
        c.disc(x, y, r, "#3c7d3a")
    c.shape((90, 410), (230, 410), (205, 440), (115, 440), colour="#8a5a33")
    c.line((130, 395), (200, 450), colour="#d9b98a", width=4)
    return c


def story() -> Canvas:
    """A lighthouse in a storm at night, a small boat in its beam."""
    c = Canvas("#0c1838", "#31507e")
    random.seed(4)
    for _ in range(70):
        c.disc(
            random.uniform(0, WIDTH), random.uniform(0, 230), random.uniform(0.6, 1.8), "#e8eeff"
        )
    c.disc(110, 90, 34, "#f5f0d5")
    c.disc(124, 82, 30, "#16254c")
    beam = Image.new("L", c.image.size, 0)
    ImageDraw.Draw(beam).polygon(
        [(SCALE * x, SCALE * y) for x, y in ((478, 132), (0, 250), (0, 370))], fill=120
    )
    c.image.paste("#fff3b0", mask=beam.filter(ImageFilter.GaussianBlur(10)))
    c.shape((400, 480), (430, 350), (540, 340), (640, 380), (640, 480), colour="#1d2430")
    c.shape((452, 352), (462, 160), (518, 160), (528, 352), colour="#f4f1ea")
    for y in (195, 255, 315):
        c.shape((457, y + 24), (459, y), (521, y), (523, y + 24), colour="#c43b33")
    c.box(455, 150, 70, 12, "#2b2f38")
    c.box(468, 116, 44, 36, "#ffe680")
    c.shape((460, 118), (490, 88), (520, 118), colour="#a52b26")
    for i, y in enumerate((370, 400, 430, 460)):
        points = [(x, y + 9 * math.sin(x / 34 + i)) for x in range(0, 660, 10)]
        c.shape((0, HEIGHT), *points, (WIDTH, HEIGHT), colour=("#23466f", "#1e3d63")[i % 2])
    c.shape((120, 372), (250, 366), (228, 402), (146, 404), colour="#7b4a2a")
    c.line((184, 370), (180, 280), colour="#3b2516", width=5)
    c.shape((178, 284), (176, 360), (120, 356), colour="#f0e6d2")
    c.shape((186, 290), (190, 358), (236, 354), colour="#e0d2b6")
    return c


def poem() -> Canvas:
    """A lone autumn tree that loses its leaves beside a bench at sunset."""
    c = Canvas("#f2a25c", "#fde3b5")
    c.disc(320, 330, 92, "#fff0b8")
    c.hills(345, 26, 2.5, "#b98a5e", 0.6)
    c.hills(385, 18, 2, "#8c6a3f")
    c.shape((196, 400), (212, 250), (228, 250), (246, 400), colour="#4a2f22")
    for a, b in (((218, 270), (150, 190)), ((222, 260), (300, 180)), ((220, 250), (216, 140))):
        c.line(a, b, colour="#4a2f22", width=9)
    random.seed(7)
    shades = ("#d9531e", "#e8842a", "#c23b22", "#f0ad3c")
    for _ in range(420):
        a, r = random.uniform(0, 2 * math.pi), 125 * math.sqrt(random.random())
        c.disc(220 + r * math.cos(a), 165 + 0.8 * r * math.sin(a), 8, random.choice(shades), 6)
    for _ in range(46):
        x = random.uniform(60, 600)
        c.disc(x, random.uniform(200, 460), 7, random.choice(shades), 4.5)
    for x in (420, 540):
        c.box(x, 380, 10, 52, "#3a2a22")
    for y in (340, 358, 384):
        c.box(404, y, 162, 11, "#6d4630", 3)
    return c


def recipe() -> Canvas:
    """A pizza with tomatoes, mozzarella and basil on a wooden table."""
    c = Canvas("#a9713f", "#8d5a2e")
    for y in range(0, 480, 80):
        c.line((0, y), (WIDTH, y), colour="#6e4522", width=3)
    c.disc(320, 244, 216, "#f7f4ee")
    c.disc(320, 244, 186, "#e3a652")
    c.disc(320, 244, 164, "#c8391f")
    random.seed(2)
    spots = [(random.uniform(0, 360), random.uniform(20, 140)) for _ in range(60)]
    for a, r in spots:
        x, y = 320 + r * math.cos(a), 244 + r * math.sin(a)
        c.disc(x, y, random.uniform(8, 20), "#f6dc8e", random.uniform(8, 18))
    for i in range(9):
        a, r = i * 0.7, 60 + 70 * (i % 2)
        x, y = 320 + r * math.cos(a), 244 + r * math.sin(a)
        if i % 3:
            c.disc(x, y, 27, "#d9281b")
            c.disc(x, y, 21, "#ec5b3f")
            for k in range(5):
                c.disc(x + 11 * math.cos(k * 1.26), y + 11 * math.sin(k * 1.26), 4, "#f7c66a", 3)
        else:
            c.disc(x, y, 30, "#fdf8ea", 24)
    for i in range(7):
        x, y = 320 + 95 * math.cos(i * 0.9 + 0.4), 244 + 95 * math.sin(i * 0.9 + 0.4)
        c.shape((x - 24, y), (x, y - 12), (x + 24, y + 2), (x, y + 13), colour="#2f7d32")
        c.line((x - 20, y), (x + 20, y + 1), colour="#63ad5d", width=1.5)
    for i in range(4):
        a = i * math.pi / 4
        dx, dy = 184 * math.cos(a), 184 * math.sin(a)
        c.line((320 - dx, 244 - dy), (320 + dx, 244 + dy), colour="#8e2a17", width=2)
    return c


def advertisement() -> Canvas:
    """A red coffee mug that steams, on a table by a window."""
    c = Canvas("#f3e9dc", "#e6d3bb")
    c.box(60, 30, 230, 250, "#ffffff")
    c.box(74, 44, 96, 222, "#bfe3f5")
    c.box(180, 44, 96, 222, "#bfe3f5")
    c.disc(122, 240, 60, "#8cbf74", 40)
    c.disc(236, 246, 62, "#7ab064", 42)
    c.box(0, 350, WIDTH, 130, "#9a6a41")
    c.box(0, 350, WIDTH, 10, "#b98557")
    c.disc(400, 410, 150, "#7d5330", 22)
    c.disc(400, 398, 140, "#f2f2f0", 20)
    c.arc(505, 290, 54, 270, 90, "#b3201f", 22)
    c.box(300, 210, 200, 185, "#d12b2a", 26)
    c.box(300, 210, 44, 185, "#de4a44", 20)
    c.disc(400, 214, 100, "#b3201f", 26)
    c.disc(400, 216, 88, "#3f2414", 20)
    c.disc(386, 214, 40, "#7a4d2c", 8)
    for x in (360, 400, 440):
        steam = [(x + 12 * math.sin(y / 16), y) for y in range(80, 190, 4)]
        c.line(*steam, colour="#fbf7f1", width=7)
    heart = (400, 320)
    c.disc(heart[0] - 16, heart[1] - 10, 19, "#fff5ea")
    c.disc(heart[0] + 16, heart[1] - 10, 19, "#fff5ea")
    c.shape((367, 317), (433, 317), (400, 356), colour="#fff5ea")
    return c


def unusual() -> Canvas:
    """A sailing boat that sails over sand dunes, past a cactus."""
    c = Canvas("#f7b267", "#fbe5c0")
    c.disc(500, 100, 50, "#fff4c9")
    c.hills(300, 40, 2.4, "#e0a458", 0.5)
    c.hills(350, 34, 1.7, "#d08c41", 2.2)
    c.line((300, 340), (300, 90), colour="#5b3a21", width=8)
    c.shape((308, 96), (308, 310), (430, 300), colour="#fdfdfb")
    c.shape((292, 112), (292, 305), (200, 300), colour="#e6eef5")
    c.shape((180, 330), (440, 330), (400, 388), (226, 388), colour="#2f6db0")
    c.line((186, 342), (434, 342), colour="#ffffff", width=6)
    c.shape((300, 88), (300, 70), (336, 79), colour="#d23b30")
    c.hills(400, 22, 2.6, "#c47b34", 4)
    for x, h in ((555, 150), (90, 110)):
        c.box(x, 425 - h, 30, h, "#4d8b4a", 15)
        c.box(x - 34, 425 - h * 0.62, 40, 20, "#4d8b4a", 10)
        c.box(x - 34, 425 - h * 0.82, 20, h * 0.3, "#4d8b4a", 10)
        c.box(x + 22, 425 - h * 0.5, 40, 20, "#4d8b4a", 10)
        c.box(x + 44, 425 - h * 0.74, 20, h * 0.34, "#4d8b4a", 10)
    return c


def _face(c: Canvas, x: float, y: float, r: float, fur: str, inner: str) -> None:
    c.disc(x, y, r, fur)
    for side in (-1, 1):
        c.disc(x + side * r * 0.4, y - r * 0.12, r * 0.15, "#ffffff", r * 0.18)
        c.disc(x + side * r * 0.4, y - r * 0.1, r * 0.08, "#1d1d1d", r * 0.13)
        for k in (-1, 0, 1):
            tip = (x + side * r * 1.15, y + r * (0.35 + 0.16 * k))
            c.line((x + side * r * 0.3, y + r * 0.36), tip, colour="#f7f2ea", width=2)
    c.shape(
        (x - r * 0.14, y + r * 0.2), (x + r * 0.14, y + r * 0.2), (x, y + r * 0.36), colour=inner
    )
    c.arc(x - r * 0.14, y + r * 0.36, r * 0.14, 0, 180, "#3a2a22", 3)
    c.arc(x + r * 0.14, y + r * 0.36, r * 0.14, 0, 180, "#3a2a22", 3)


def joke() -> Canvas:
    """A kitten looks into a mirror and sees a lion."""
    c = Canvas("#cfe0e8", "#b7cdd8")
    c.box(0, 390, WIDTH, 90, "#8a6246")
    c.box(330, 40, 250, 360, "#7a5a2c", 18)
    c.box(348, 58, 214, 324, "#e7f4f8", 8)
    c.shape((360, 160), (470, 64), (500, 64), (360, 190), colour="#f6fcfe")
    for k in range(18):
        a = k * math.pi / 9
        c.disc(455 + 82 * math.cos(a), 205 + 82 * math.sin(a), 30, "#9c5a1e")
    c.disc(455, 205, 92, "#b06a26")
    c.disc(455, 350, 76, "#d99a45", 52)
    c.box(348, 382, 214, 18, "#7a5a2c")
    for side in (-1, 1):
        c.disc(455 + side * 54, 148, 20, "#d99a45")
    _face(c, 455, 210, 66, "#e0a652", "#6b3a25")
    c.line((70, 420), (36, 360), (58, 320), colour="#6f7680", width=16)
    c.disc(130, 390, 74, "#7e8690", 62)
    for side in (-1, 1):
        base = 150 + side * 34
        c.shape((base - 22, 270), (base + side * 16, 216), (base + 24, 270), colour="#7e8690")
        c.shape((base - 11, 266), (base + side * 13, 232), (base + 12, 266), colour="#e7b3b3")
    _face(c, 150, 300, 58, "#8b949e", "#d98a8a")
    for x in (104, 160):
        c.disc(x, 444, 26, "#8b949e", 14)
    return c


def draft() -> Canvas:
    """A website sketched by hand on squared paper."""
    c = Canvas("#fdfdf8", "#f7f7ef")
    for x in range(0, WIDTH, 20):
        c.line((x, 0), (x, HEIGHT), colour="#dfe9f2", width=1)
    for y in range(0, HEIGHT, 20):
        c.line((0, y), (WIDTH, y), colour="#dfe9f2", width=1)
    random.seed(11)
    ink = "#2a2f45"

    def stroke(a: Point, b: Point) -> None:
        points = []
        for k in range(13):
            t = k / 12
            shake = 0 if k in (0, 12) else random.uniform(-1.6, 1.6)
            points.append((a[0] + t * (b[0] - a[0]) + shake, a[1] + t * (b[1] - a[1]) + shake))
        c.line(*points, colour=ink, width=2.6)

    def frame(x: float, y: float, w: float, h: float) -> None:
        corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        for i in range(4):
            stroke(corners[i], corners[(i + 1) % 4])

    def word(x: float, y: float, text: str, size: int) -> None:
        font = ImageFont.load_default(size * SCALE)
        layer = Image.new("L", (int(len(text) * size * SCALE * 0.9) + 40, size * SCALE * 2), 0)
        ImageDraw.Draw(layer).text((10, 6), text, font=font, fill=255)
        layer = layer.rotate(random.uniform(-2.4, 2.4), Image.Resampling.BICUBIC, expand=True)
        c.image.paste(ink, (int(x * SCALE), int(y * SCALE)), layer)

    frame(50, 36, 540, 408)
    word(190, 56, "My Joke Website", 32)
    stroke((80, 116), (560, 112))
    word(90, 134, "Why did the chicken", 24)
    word(90, 168, "cross the road?", 24)
    frame(90, 222, 250, 52)
    word(112, 228, "Show the answer", 24)
    word(90, 300, "To get to the other side!", 22)
    frame(390, 150, 160, 150)
    stroke((390, 150), (550, 300))
    stroke((550, 150), (390, 300))
    word(420, 306, "picture", 20)
    for i in range(3):
        frame(90 + 150 * i, 366, 120, 44)
        word(112 + 150 * i, 370, ("Home", "Jokes", "About")[i], 20)
    return c


PICTURES: tuple[Callable[[], Canvas], ...] = (
    describe, story, poem, recipe, advertisement, unusual, joke, draft,
)  # fmt: skip

if __name__ == "__main__":
    for picture in PICTURES:
        picture().save(SUITE / f"{picture.__name__}.jpg")
