"""Draws the evaluation suite's own pictures: `python -m tools.draw_suite`.

The suite's other pictures are drawn by draw_abilities.py, or composed by compose_suite.py.
"""

import math

from minigpt4.evaluation.suite import SUITE
from tools.draw_abilities import HEIGHT, WIDTH, Canvas


def burger() -> Canvas:
    """A hamburger with lettuce, tomato and cheese on a plate, chips beside it."""
    c = Canvas("#f3e9dc", "#c9a27a")
    c.disc(320, 400, 270, "#ffffff", 60)
    c.disc(320, 395, 225, "#e9edf0", 44)
    for i, x in enumerate(range(470, 560, 16)):
        c.line(
            (x, 400 - 6 * (i % 3)), (x + 20 - 9 * i, 300 + 8 * (i % 2)), colour="#f2c14e", width=11
        )
    c.box(170, 332, 280, 56, "#c9822f", 26)
    c.box(160, 304, 300, 34, "#5b3420", 16)
    c.shape(
        (160, 300), (460, 300), (430, 334), (400, 304), (250, 336), (220, 304), colour="#ffc933"
    )
    c.box(175, 278, 270, 24, "#d7382b", 12)
    for x in range(165, 455, 24):
        c.disc(x + 12, 272, 20, "#6cb33f", 11)
    dome = [(310 + 150 * math.cos(a / 50), 265 - 105 * math.sin(a / 50)) for a in range(158)]
    c.shape(*dome, colour="#d9953c")
    for x, y in ((240, 200), (290, 180), (345, 188), (395, 212), (265, 230), (330, 225)):
        c.disc(x, y, 8, "#f6e3bd", 5)
    return c


def eggs() -> Canvas:
    """Two fried eggs and bacon in a black pan, seen from above."""
    c = Canvas("#b9c7ce", "#93a6b0")
    c.box(470, 215, 170, 46, "#3a2a20", 20)
    c.disc(290, 240, 205, "#20242a")
    c.disc(290, 240, 180, "#343a42")
    for x, y in ((225, 185), (335, 275)):
        c.disc(x, y, 78, "#fdfdf8", 68)
        c.disc(x + 35, y + 25, 48, "#fdfdf8", 42)
        c.disc(x, y, 32, "#f6b11e")
        c.disc(x - 9, y - 10, 9, "#fbd77a")
    for y in (320, 352):
        points = [(130 + t, y + 9 * math.sin(t / 16)) for t in range(0, 150, 5)]
        c.line(*points, colour="#b33a34", width=22)
        c.line(*points, colour="#f0c6b4", width=6)
    return c


def lamp() -> Canvas:
    """A green desk lamp that shines on an open book."""
    c = Canvas("#2b3350", "#46507a")
    c.box(0, 380, WIDTH, 100, "#7a5230")
    c.shape((330, 190), (140, 380), (430, 380), colour="#8f8a66")
    c.shape((345, 190), (210, 380), (420, 380), colour="#c9bd7c")
    c.disc(480, 392, 78, "#1f7a54", 16)
    c.line((480, 385), (530, 250), (400, 140), colour="#2a9a6b", width=14)
    c.disc(530, 250, 14, "#176343")
    c.shape((400, 120), (435, 165), (360, 225), (300, 170), colour="#1f7a54")
    c.disc(335, 200, 26, "#fff3b0", 18)
    c.shape(
        (170, 372), (300, 360), (430, 372), (430, 392), (300, 382), (170, 392), colour="#f7f2e4"
    )
    c.line((300, 360), (300, 384), colour="#b9ad8d", width=3)
    return c


def umbrella() -> Canvas:
    """A bright yellow umbrella in the rain before a grey town."""
    c = Canvas("#7d8a99", "#aab4bf")
    for i, x in enumerate(range(0, WIDTH, 80)):
        c.box(x, 190 + 37 * (i % 3), 76, 300, ("#5f6b79", "#697685", "#566270")[i % 3])
        for y in range(230 + 37 * (i % 3), 400, 40):
            c.box(x + 14, y, 16, 20, "#8c99a6")
            c.box(x + 46, y, 16, 20, "#8c99a6")
    c.box(0, 410, WIDTH, 70, "#4a535e")
    for i in range(90):
        x, y = (i * 73) % WIDTH, (i * 47) % HEIGHT
        c.line((x, y), (x - 6, y + 22), colour="#c7d3de", width=2)
    c.line((320, 150), (320, 400), colour="#3a2f28", width=9)
    c.arc(300, 398, 20, 0, 180, "#3a2f28", 9)
    c.shape(*[(320 + 190 * math.cos(a / 50), 250 - 150 * math.sin(a / 50)) for a in range(158)],
            colour="#ffd21f")  # fmt: skip
    for x in (168, 244, 320, 396, 472):
        c.disc(x, 250, 38, "#ffd21f", 22)
    for x in (206, 282, 358, 434):
        c.line((320, 102), (x, 250), colour="#e0ac00", width=4)
    return c


def snowman() -> Canvas:
    """A snowman under a parasol on a hot beach sips a drink and melts."""
    c = Canvas("#62c3f0", "#d9f3fb")
    c.disc(560, 80, 56, "#ffd54a")
    for a in range(0, 360, 30):
        x, y = math.cos(math.radians(a)), math.sin(math.radians(a))
        c.line((560 + 68 * x, 80 + 68 * y), (560 + 92 * x, 80 + 92 * y), colour="#ffd54a", width=7)
    c.box(0, 255, WIDTH, 80, "#2f8fc4")
    c.box(0, 320, WIDTH, 160, "#f0d9a0")
    c.disc(290, 425, 150, "#bfe6f7", 28)
    c.line((165, 425), (215, 130), colour="#8a5a33", width=9)
    c.shape((60, 190), (110, 110), (215, 85), (320, 125), (365, 205), colour="#e2483d")
    c.shape((150, 196), (170, 100), (215, 85), (250, 100), (275, 200), colour="#ffffff")
    c.disc(295, 375, 84, "#ffffff", 70)
    c.disc(295, 285, 58, "#ffffff", 54)
    c.box(252, 268, 38, 22, "#1b1b1b", 8)
    c.box(300, 268, 38, 22, "#1b1b1b", 8)
    c.line((288, 275), (304, 275), colour="#1b1b1b", width=4)
    c.shape((293, 294), (293, 306), (340, 306), colour="#f28a1c")
    for y in (350, 380, 410):
        c.disc(295, y, 6, "#333333")
    c.line((370, 350), (430, 330), colour="#6b4a2d", width=8)
    c.shape((415, 290), (465, 290), (455, 350), (425, 350), colour="#f7a823")
    c.line((450, 300), (470, 250), colour="#e2483d", width=5)
    c.disc(240, 330, 7, "#9fd8f0", 11)
    c.disc(350, 315, 6, "#9fd8f0", 10)
    return c


def fishbowl() -> Canvas:
    """A goldfish in a bowl, with a diver's snorkel and mask on."""
    c = Canvas("#f7e3e8", "#e7c4cf")
    c.box(0, 400, WIDTH, 80, "#8b5a3c")
    c.disc(320, 260, 180, "#d7eef7", 165)
    c.shape(
        (152, 205), (488, 205), (500, 270), (430, 400), (210, 400), (140, 270), colour="#79c3e6"
    )
    c.disc(320, 330, 172, "#79c3e6", 85)
    c.disc(320, 100, 110, "#eef8fc", 16)
    c.disc(300, 285, 82, "#f58220", 55)
    c.shape((370, 285), (455, 230), (455, 340), colour="#f58220")
    c.shape((290, 232), (330, 195), (350, 245), colour="#d96a10")
    c.box(215, 252, 62, 48, "#222b38", 14)
    c.box(222, 259, 48, 34, "#bfe6f7", 10)
    c.disc(246, 276, 9, "#111111")
    c.line((277, 272), (372, 262), colour="#222b38", width=7)
    c.line((228, 318), (196, 318), (188, 150), colour="#e2483d", width=10)
    for x, y, r in ((150 + 40, 120, 9), (205, 90, 6), (175, 85, 5)):
        c.disc(x, y, r, "#b9dcec")
    for x in range(200, 450, 22):
        c.disc(x, 398, 12, ("#b7a084", "#9c8568")[x % 4 // 2], 8)
    return c


if __name__ == "__main__":
    for make in (burger, eggs, lamp, umbrella, snowman, fishbowl):
        make().save(SUITE / f"{make.__name__}.jpg")
