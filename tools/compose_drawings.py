"""Composes drawings out of emoji, with texts about them, for mini's training.

    python -m tools.compose_drawings EMOJI DATA/drawn --count 4500 --teacher mini

EMOJI holds the pictures of three sets and their names, out of npm packages: `twemoji/`
(@twemoji/svg 15.0.0; graphics CC-BY 4.0), `flat/` and `solid/` (@lobehub/fluent-emoji-flat and
-3d 1.1.0, Microsoft's Fluent Emoji; MIT), and `names.json` (en/data.json of emojibase-data 17.0.0;
MIT). The pictures of the evaluation suite are another set's (`compose_suite.py`), and nothing of
them is used here. Needs resvg-py, which nothing else does.
"""

import argparse
import colorsys
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 360  # pixels of a picture
SHARD = 1000  # pictures
# Groups and subgroups of emojibase: people, animals, food, places, activities, objects.
GROUPS = {1: "person", 3: "animal", 4: "food", 5: "place", 6: "activity", 7: "object"}
_PEOPLE = {
    *("baby", "boy", "girl", "man", "woman", "old man", "old woman", "astronaut", "ninja"),
    *("woman cook", "man cook", "woman farmer", "man farmer", "woman artist", "man pilot"),
    *("woman scientist", "man firefighter", "woman police officer", "prince", "princess"),
    *("woman student", "man mechanic", "mermaid", "vampire", "man superhero"),
    *("skier", "snowboarder", "woman surfing", "man biking", "woman running", "man swimming"),
    *("man lifting weights", "woman dancing", "man golfing", "man rowing boat", "person in bed"),
    *("woman juggling", "person taking bath", "man climbing", "woman walking", "horse racing"),
}
# Words of names: symbols, parts of bodies, what is hard to name or to draw alone.
_WORDS = (
    "8 alembic amulet antenna arrival arrow ATM badminton ballot bank banknote battery behind "
    "bellhop blood bookmark bowling bug bullseye button cableway card ceremony chain chains chart "
    "cigarette cityscape clamp clinking coffin confetti construction control cricket crutch "
    "custard cyclone dagger dango decoration departure derelict die disk diya dna dodo dolls done "
    "droplet dvd e-mail ear eight-thirty eleven-thirty face: falafel fallen fax feather file "
    "five-thirty flag floppy flower: fluttering fog foggy folder four-thirty game gear globe "
    "guide hamsa hand hatching headstone hockey hook hot-springs identification inbox incoming "
    "index insect iron-on Japanese joker kaaba knot label lacrosse landslide ledger leg level "
    "link linked locked love low mahjong mail mailbox map martial mate medal memo metro microbe "
    "milky moai moon motorway musical national nazar nib night nine-thirty nose notes nut "
    "oncoming one-thirty optical outbox o’clock page pager performing petri pick placard plug "
    "pouring pushpin railway receipt receiver reminder rosette ruler sauropod scroll seat "
    "seedling service seven-thirty six-thirty skin slash sparkles speaker spiral springs station "
    "Statue streamer suit sunrise tabs tamale tanabata ten-thirty tennis three-thirty ticket "
    "tickets tilted Tokyo trackball tramway twelve-thirty two-thirty unlocked urn voltage volume "
    "wave wedding wheel wilted wind wing wings wood worm x-ray"
)
_LEFT_OUT = set(_WORDS.split())
_CALLED = {  # what people call it
    "hot beverage": "cup of coffee",
    "steaming bowl": "bowl of noodles",
    "cooking": "fried egg in a pan",
    "shallow pan of food": "pan of paella",
    "pot of food": "pot of stew",
    "fondue": "pot of cheese fondue",
    "curry rice": "plate of curry with rice",
    "cooked rice": "bowl of rice",
    "spaghetti": "plate of spaghetti",
    "bowl with spoon": "bowl of soup",
    "green salad": "bowl of salad",
    "meat on bone": "piece of meat on the bone",
    "deciduous tree": "tree",
    "evergreen tree": "fir tree",
    "automobile": "car",
    "sport utility vehicle": "van",
    "articulated lorry": "lorry",
    "dog face": "dog",
    "cat face": "cat",
    "horse face": "horse",
    "cow face": "cow",
    "pig face": "pig",
    "mouse face": "mouse",
    "monkey face": "monkey",
    "rabbit face": "rabbit",
    "tiger face": "tiger",
    "dragon face": "dragon",
    "front-facing baby chick": "chick",
    "baby chick": "chick",
    "spouting whale": "whale that spouts water",
    "flying disc": "frisbee",
    "couch and lamp": "couch and a lamp",
    "camera with flash": "camera",
    "mobile phone": "telephone",
    "umbrella with rain drops": "umbrella in the rain",
    "billed cap": "cap",
    "man’s shoe": "man's shoe",
    "woman’s boot": "boot",
    "woman’s hat": "sun hat",
    "gem stone": "diamond",
    "wrapped gift": "gift",
    "camping": "tent in the wild",
    "two-hump camel": "camel",
    "snow-capped mountain": "snowy mountain",
    "mount fuji": "snowy mountain",
    "passenger ship": "ship",
    "soft ice cream": "ice cream cone",
    "man biking": "man on a bicycle",
    "woman surfing": "woman on a surfboard",
    "man rowing boat": "man in a rowing boat",
    "horse racing": "jockey on a horse",
    "woman running": "running woman",
    "woman walking": "walking woman",
    "woman dancing": "dancing woman",
    "woman juggling": "juggling woman",
    "man swimming": "swimming man",
    "man golfing": "man who plays golf",
    "man climbing": "climbing man",
    "man lifting weights": "man who lifts weights",
    "person taking bath": "person in a bathtub",
}
_NO_ARTICLE = {
    *("bread", "sushi", "popcorn", "bacon", "butter", "salt", "broccoli", "garlic", "soap", "fire"),
    *("yarn", "coral", "rice", "sake", "bubble tea", "ice"),
}
_NOT_PLURAL = {
    *("bus", "cactus", "octopus", "minibus", "trolleybus", "lotus", "canvas", "abacus", "hibiscus"),
    *("rhinoceros", "hippopotamus"),
}
_COLOURS = ((18, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (255, "blue"))
_COLOURS += ((290, "purple"), (340, "pink"), (360, "red"))


@dataclass(frozen=True)
class Thing:
    """One emoji: its code, its kind (`GROUPS`), and what it is called."""

    code: str
    kind: str
    name: str

    @property
    def plural(self) -> bool:
        head = self.name.split(" of ")[0].split(" with ")[0].split(" in ")[0].split(" and ")[0]
        word = head.split()[-1]
        return word.endswith("s") and not word.endswith("ss") and word not in _NOT_PLURAL

    def called(self, colour: str = "") -> str:
        """With its article: "a red backpack", "pancakes"."""
        words = f"{colour} {self.name}".strip()
        if self.plural or self.name in _NO_ARTICLE:
            return words
        vowel = words[0].lower() in "aeiou" and not words.startswith(("uni", "ewe", "one"))
        return f"{'an' if vowel else 'a'} {words}"


def read_things(folder: Path) -> list[Thing]:
    """The emoji that show a thing one can name."""
    found = []
    for record in json.loads((folder / "names.json").read_text(encoding="utf-8")):
        label, kind = record["label"], GROUPS.get(record.get("group", -1))
        known = label in _PEOPLE if kind == "person" else kind is not None
        if known and not _LEFT_OUT & set(label.split()):
            code = record["hexcode"].lower()
            if pictures_of(folder, code):
                found.append(Thing(code, kind or "", _CALLED.get(label, label)))
    return found


@cache
def pictures_of(folder: Path, code: str) -> tuple[Path, ...]:
    """The files of one emoji in the three sets."""
    places = (("twemoji", "svg"), ("flat/assets", "svg"), ("solid/assets", "webp"))
    codes = dict.fromkeys((code, code.replace("-fe0f", "")))
    return tuple(
        path
        for place, ending in places
        for one in codes
        if (path := folder / place / f"{one}.{ending}").exists()
    )


@cache
def opened(path: Path) -> Image.Image:
    """RGBA, cut to what is drawn."""
    if path.suffix == ".svg":
        from resvg_py import svg_to_bytes

        picture = Image.open(io.BytesIO(bytes(svg_to_bytes(svg_path=str(path), width=256))))
    else:
        picture = Image.open(path)
    picture = picture.convert("RGBA")
    return picture.crop(picture.getbbox())


def colour_of(picture: Image.Image) -> str:
    """The colour that three fifths of it have, or ""."""
    small = np.asarray(picture.resize((32, 32))).reshape(-1, 4).tolist()
    names: Counter[str] = Counter()
    for red, green, blue, alpha in small:
        if alpha > 128:
            hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
            if value < 0.25:
                names["black"] += 1
            elif saturation < 0.15:
                names["white" if value > 0.85 else "grey"] += 1
            else:
                name = next(name for end, name in _COLOURS if hue * 360 <= end)
                brown = name in ("orange", "red") and value < 0.65
                names["brown" if brown else name] += 1
    name, count = names.most_common(1)[0]
    return name if count > 0.6 * names.total() else ""


# --- backgrounds ----------------------------------------------------------------------------------


def shaded(draw: random.Random, top: Sequence[int], bottom: Sequence[int]) -> Image.Image:
    """From one colour to another, both changed a little."""
    ends = [[min(255, max(0, c + draw.randint(-14, 14))) for c in one] for one in (top, bottom)]
    column = Image.new("RGB", (1, 2))
    column.putdata([tuple(one) for one in ends])
    return column.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def plain(draw: random.Random) -> Image.Image:
    light = [draw.randint(170, 255) for _ in range(3)]
    return shaded(draw, light, light if draw.random() < 0.5 else [c - 30 for c in light])


def white(draw: random.Random) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), "white")


def ground(
    sky: Sequence[int], below: Sequence[int], wavy: float = 0.04
) -> Callable[[random.Random], Image.Image]:
    """A sky over a ground with its own line."""

    def made(draw: random.Random) -> Image.Image:
        picture = shaded(draw, sky, [min(255, c + 60) for c in sky])
        pen = ImageDraw.Draw(picture)
        level = draw.uniform(0.55, 0.75)
        at = [level + draw.uniform(-wavy, wavy) for _ in range(5)]
        line = [(SIDE * i / 4, SIDE * y) for i, y in enumerate(at)]
        colour = tuple(min(255, max(0, c + draw.randint(-15, 15))) for c in below)
        pen.polygon([*line, (SIDE, SIDE), (0, SIDE)], fill=colour)
        return picture

    return made


def night(draw: random.Random) -> Image.Image:
    picture = ground((12, 16, 52), (20, 34, 40))(draw)
    pen = ImageDraw.Draw(picture)
    for _ in range(draw.randint(15, 60)):
        x, y, r = draw.randrange(SIDE), draw.randrange(SIDE // 2), draw.choice((0, 1, 1, 2))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(250, 245, 210))
    return picture


def room(draw: random.Random) -> Image.Image:
    wall = [draw.randint(190, 245) for _ in range(3)]
    picture = ground(wall, (150, 110, 75), 0.0)(draw)
    if draw.random() < 0.7:
        pen, x = ImageDraw.Draw(picture), draw.choice((30, 230))
        pen.rectangle((x, 40, x + 90, 120), fill=(165, 210, 240), outline="white", width=6)
    return picture


def table(draw: random.Random) -> Image.Image:
    """A plate on a table, from above."""
    wood = draw.choice(((170, 120, 75), (205, 165, 120), (120, 80, 50), (225, 225, 220)))
    picture = shaded(draw, wood, [c - 15 for c in wood])
    r, shade = draw.randint(125, 165), draw.choice(("white", "#eef2f7", "#f6efe2"))
    pen, middle = ImageDraw.Draw(picture), SIDE // 2
    pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=shade, outline="#cfc8bd")
    return picture


@dataclass(frozen=True)
class Scene:
    """A background, the words that say where one is in it, and a sentence about it."""

    make: Callable[[random.Random], Image.Image]
    where: str
    sentence: str


PLAIN = Scene(plain, "", "The background is plain.")
WHITE = Scene(white, "", "The background is white.")
TABLE = Scene(table, " on a plate", "The plate is on a table.")
OUTSIDE = (
    Scene(ground((110, 180, 240), (105, 175, 80)), " on green grass", "The sky above is blue."),
    Scene(ground((130, 200, 245), (40, 130, 190), 0.01), " at the sea", "The water is blue."),
    Scene(ground((160, 195, 225), (245, 248, 252)), " in the snow", "The ground is white."),
    Scene(ground((245, 195, 110), (220, 165, 90)), " in the desert", "The ground is sand."),
    Scene(night, " at night", "There are stars in the dark sky."),
)
ROOM = Scene(room, " in a room", "There is a wall behind.")


def scene_for(things: Sequence[Thing], draw: random.Random) -> Scene:
    kinds = {thing.kind for thing in things}
    if kinds == {"food"}:
        return draw.choice((TABLE, TABLE, PLAIN, WHITE))
    if kinds & {"animal", "place", "person", "activity"}:
        return draw.choice((*OUTSIDE, PLAIN, WHITE))
    return draw.choice((PLAIN, PLAIN, WHITE, ROOM, OUTSIDE[0]))


# --- a picture and its texts ----------------------------------------------------------------------


def put(
    canvas: Image.Image, picture: Image.Image, draw: random.Random, x: float, y: float, size: float
) -> None:
    """Its longer side is a share of the canvas's, its middle at (x, y), both shares."""
    if draw.random() < 0.3:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size * SIDE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    corner = (round(x * SIDE - picture.width / 2), round(y * SIDE - picture.height / 2))
    canvas.paste(picture, corner, picture)


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def compose(
    folder: Path, things: Sequence[Thing], absent: Thing, draw: random.Random
) -> tuple[Image.Image, dict]:
    """One or two things before a background, from the left; and what is written about them."""
    scene = scene_for(things, draw)
    canvas, names = scene.make(draw), []
    pictures = [opened(draw.choice(pictures_of(folder, thing.code))) for thing in things]
    for place, (thing, picture) in enumerate(zip(things, pictures, strict=True)):
        alone = len(things) == 1
        size = draw.uniform(0.4, 0.75) if alone else draw.uniform(0.28, 0.42)
        x = 0.5 if alone else (0.28, 0.73)[place]
        put(canvas, picture, draw, x + draw.uniform(-0.06, 0.06), draw.uniform(0.46, 0.58), size)
        coloured = thing.kind in ("object", "place", "activity") and " " not in thing.name
        names.append(thing.called(colour_of(picture) if coloured else ""))
    return canvas, texts(things, names, scene, absent, draw)


def texts(
    things: Sequence[Thing], names: Sequence[str], scene: Scene, absent: Thing, draw: random.Random
) -> dict:
    """Captions, a description, questions and answers."""
    are = "are" if len(things) > 1 or things[0].plural else "is"
    both = " and ".join(names)
    beside = f"{names[0]} {'next to' if draw.random() < 0.5 else 'beside'} {names[-1]}"
    first, last = things[0].name, things[-1].name
    captions = [f"A drawing of {both}{scene.where}."]
    captions.append(f"{upper(both if len(things) == 1 else beside)}{scene.where}.")
    some = [f"some {name}" if not name.startswith(("a ", "an ")) else name for name in names]
    captions.append(f"A cartoon of {' and '.join(some)}{scene.where}.")
    place = "It is in the middle." if are == "is" else "They are in the middle."
    questions = [
        ["Is this a photo or a drawing?", "It is a drawing."],
        ["What does this drawing show?", f"It shows {both}{scene.where}."],
        ["What is in this picture?", f"{upper(both)}, as a drawing."],
        [f"Is there {absent.called()} in this picture?", f"No, it shows {both}."],
    ]
    if len(things) == 2:
        place = f"The {first} is on the left, and the {last} is on the right."
        place = place if not any(t.plural for t in things) else f"From the left: {both}."
        questions.append([f"Where is the {last}?", "It is on the right."])
        questions.append([f"What is next to the {first}?", f"{upper(names[1])}."])
    elif things[0].kind == "food":
        questions.append(["What food is this?", f"{upper(names[0])}."])
    description = f"This is a drawing of {both}{scene.where}. {place} {scene.sentence}"
    record = {"captions": captions, "description": description, "questions": questions}
    return record | {"drawn": True}


# --- what a language model writes about a thing ---------------------------------------------------

TASKS = {
    "food": (
        "Write a recipe for {} in at most sixty words: the ingredients, then three steps.",
        ("How do I cook this dish?", "Give me a recipe for this.", "How is this made?"),
    ),
    "object": (
        "Write an advertisement for {} in three sentences.",
        ("Write an advertisement for this product.", "Advertise this product in a few sentences."),
    ),
    "": (
        "Write a poem of four lines about {}.",
        ("Write a poem about this picture.", "Can you write a beautiful poem about this image?"),
    ),
}


def task_kind(thing: Thing) -> str:
    """The kind of task about it, of TASKS."""
    return thing.kind if thing.kind in TASKS else ""


def taught(things: Sequence[Thing], model: str, file: Path) -> dict[str, str]:
    """What the model writes, without a picture, about each thing: {"kind name": text}. Kept in
    `file`."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    from minigpt4.batch import Batch
    from minigpt4.config import get_model
    from minigpt4.conversation import Conversation, ask
    from minigpt4.engine import Engine, Sampling
    from minigpt4.weights.load import find_weights, load_model

    config = get_model(model)
    loaded = load_model(config, find_weights(config), quantize="int4", adapters=False)
    wanted = list(dict.fromkeys((task_kind(thing), thing.name, thing.called()) for thing in things))
    poems = [one for one in wanted if not one[0]]
    wanted = [one for one in wanted if one[0]] + poems[::2]
    sampling = Sampling(temperature=0.3, max_new_tokens=130, seed=1)

    def write(item):
        conversation = Conversation.asking(TASKS[item[0]][0].format(item[2]))
        completion = yield ask(engine, conversation, sampling)
        return completion

    found: dict[str, str] = {}
    with Engine(loaded) as engine, Batch(engine, 12) as batch:
        for (kind, name, _), completion in batch.run(wanted, write):
            if not completion.truncated:
                found[f"{kind} {name}"] = completion.text.strip()
    file.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    return found


def chosen(things: Sequence[Thing], number: int, draw: random.Random) -> tuple[list[Thing], Thing]:
    """What picture `number` shows, one thing or two of different names, and one that it does not.

    Every thing comes up again and again, and food more often than the rest.
    """
    foods = [thing for thing in things if thing.kind == "food"]
    shown = [things[number % len(things)] if draw.random() < 0.7 else draw.choice(foods)]
    others = [thing for thing in things if thing.name != shown[0].name]
    if draw.random() < 0.4:
        alike = [thing for thing in others if thing.kind == shown[0].kind]
        shown.append(draw.choice(alike if alike and draw.random() < 0.6 else others))
    names = {thing.name for thing in shown}
    return shown, draw.choice([thing for thing in others if thing.name not in names])


def add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """Write a file into the shard."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def main() -> None:
    """Write shards of pictures and their texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4500)
    parser.add_argument("--teacher", default="")
    options = parser.parse_args()
    things = read_things(options.emoji)
    if not things:
        raise SystemExit(f"{options.emoji} lacks the sets of pictures that --help names.")
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("drawn-*.tar"):
        old.unlink()
    answers: dict[str, str] = {}
    if options.teacher:
        answers = taught(things, options.teacher, options.out / f"taught-{options.teacher}.json")
    for first in range(0, options.count, SHARD):
        with tarfile.open(options.out / f"drawn-{first // SHARD:05d}.tar", "w") as shard:
            for number in range(first, min(first + SHARD, options.count)):
                draw = random.Random(f"drawing {number}")
                shown, absent = chosen(things, number, draw)
                picture, record = compose(options.emoji, shown, absent, draw)
                kind = task_kind(shown[0])
                if len(shown) == 1 and (answer := answers.get(f"{kind} {shown[0].name}")):
                    record["task"] = [draw.choice(TASKS[kind][1]), answer]
                content = io.BytesIO()
                picture.save(content, "JPEG", quality=90)
                told = json.dumps(record, ensure_ascii=False)
                add_member(shard, f"{number:06d}.jpg", content.getvalue())
                add_member(shard, f"{number:06d}.json", told.encode())


if __name__ == "__main__":
    main()
