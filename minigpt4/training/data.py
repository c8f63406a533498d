"""Training data: pictures with texts, from WebDataset shards or the published stage-2 layout."""

import glob
import json
import math
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from minigpt4 import _data
from minigpt4.errors import UserError
from minigpt4.model import image

PROMPTS = _data.folder("prompts")


@dataclass(frozen=True)
class Text:
    """What is learned of a picture: `answer` to one of `instructions` (none: the stage's own)."""

    answer: str
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A picture and its texts; `read` gives the picture's file content."""

    key: str  # "shard/name" or the id: unique in a data set
    read: Callable[[], bytes]
    texts: tuple[Text, ...]
    captions: tuple[str, ...] = field(default=())
    version: str = ""  # changes when the picture's file does

    def picture(self) -> Image.Image:
        """The decoded picture, RGB; UserError names it where it cannot be read."""
        try:
            return image.load(self.read()).rgb
        except UserError as error:
            raise UserError(f"Picture {self.key} of the data cannot be used: {error}") from error


def read_lines(name: str) -> list[str]:
    """The non-empty lines of a file in `prompts/` that are no comments (#)."""
    try:
        lines = (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts/{name} cannot be read: it must be there, in UTF-8.") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_shards(pattern: str, instructions: tuple[str, ...] = ()) -> list[Example]:
    """WebDataset shards as img2dataset writes them: KEY.jpg beside KEY.json or KEY.txt.

    pattern: a path, a glob or a brace range ("train-{00000..00007}.tar"). Only the index and the
    captions are held in memory; pictures are read from the tar when asked for.
    """
    examples = []
    for path in expand(pattern):
        examples += _read_shard(Path(path), instructions)
    if not examples:
        raise UserError(f"{pattern} holds no pictures with captions (KEY.jpg beside KEY.json).")
    return examples


def expand(pattern: str) -> list[str]:
    """The shards that a path, a glob or a brace range names; UserError where one is missing."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        first, last = brace.groups()
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        paths = [pattern[: brace.start()] + n + pattern[brace.end() :] for n in numbers]
    else:
        paths = sorted(glob.glob(str(Path(pattern).expanduser())))
    missing = [p for p in paths if not Path(p).is_file()]
    if missing or not paths:
        raise UserError(f"There is no shard {missing[0] if missing else pattern}: check the path.")
    return paths


PICTURE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}


def _read_shard(path: Path, instructions: tuple[str, ...]) -> Iterator[Example]:
    pictures: dict[str, tuple[int, int]] = {}
    captions: dict[str, list[str]] = {}
    try:
        with tarfile.open(path, "r:") as shard:  # compressed ones cannot be read at offsets
            for member in filter(tarfile.TarInfo.isfile, shard):
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key, suffix = f"{path.stem}/{folder}/{key}".replace("/./", "/"), suffix.lower()
                key = key.replace("//", "/")
                if suffix in PICTURE_SUFFIXES:
                    pictures[key] = (member.offset_data, member.size)
                elif suffix == "json":
                    captions[key] = _captions_of(json.load(shard.extractfile(member)))
                elif suffix == "txt":
                    text = shard.extractfile(member).read().decode("utf-8", "replace")
                    captions.setdefault(key, [text.strip()])
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable, uncompressed tar shard: fetch it again, or unpack it."
        ) from error
    stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    for key, (offset, size) in pictures.items():
        if captions.get(key):
            texts = tuple(Text(c, instructions) for c in captions[key])
            found = tuple(captions[key])
            yield Example(key, _slice(path, offset, size), texts, found, f"{stamp} {offset}")


def _captions_of(record: object) -> list[str]:
    """ "captions", a list, or "caption", one; whatever else stands there is no caption."""
    if not isinstance(record, dict):
        return []
    found = record.get("captions") or record.get("caption") or []
    found = [found] if isinstance(found, str) else found
    return [c for c in found if isinstance(c, str) and c.strip()]


def _slice(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as shard:
            shard.seek(offset)
            return shard.read(size)

    return read


def read_descriptions(folder: str | Path) -> list[Example]:
    """The published second-stage layout: `filter_cap.json` and `image/ID.jpg`."""
    folder = Path(folder)
    try:
        annotations = json.loads((folder / "filter_cap.json").read_text(encoding="utf-8"))
        pairs = [(str(a["image_id"]), a["caption"]) for a in annotations["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not in the second stage's layout: it needs filter_cap.json with "
            "“annotations” of “image_id” and “caption”, and the pictures as image/ID.jpg; or a "
            "table of captions (CSV or JSON lines) beside the pictures."
        ) from error
    return [_described(folder, key, (Text(caption),)) for key, caption in pairs]


def _described(folder: Path, key: str, texts: tuple[Text, ...]) -> Example:
    path = folder / "image" / f"{key}.jpg"
    if not path.is_file():
        raise UserError(f"The picture {path} is missing: every image_id needs image/ID.jpg.")
    status = path.stat()
    version = f"{status.st_size} {status.st_mtime_ns}"
    return Example(key, path.read_bytes, texts, version=version)


def read_instructions(file: str | Path, folder: str | Path) -> list[Example]:
    """JSON lines {"image_id", "pairs": [{"instruction", "answer"}]}; pictures in folder/image."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
        found = [
            (
                str(r["image_id"]),
                tuple(Text(p["answer"], (p["instruction"],)) for p in r["pairs"]),
            )
            for r in records
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no instruction file: each line must be a JSON object with “image_id” and "
            "“pairs” of “instruction” and “answer”."
        ) from error
    return [_described(Path(folder), key, texts) for key, texts in found]


def published_caption(caption: str, max_words: int = 50) -> str:
    """Stage 1's caption clean-up in the published code (BLIP's caption processor)."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def batches(count: int, size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of `size` indices below `count`, each epoch in a new order; from batch
    `start` on. The order depends on seed, count and size alone, so a resumed run repeats it."""
    step = start
    per_epoch = max(1, count // size)
    while True:
        epoch, place = divmod(step, per_epoch)
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        while len(order) < size:  # fewer examples than a batch: go round again
            order += order[: size - len(order)]
        yield from (order[i * size : (i + 1) * size] for i in range(place, per_epoch))
        step = (epoch + 1) * per_epoch


def mixed_batches(
    counts: Sequence[int], sizes: Sequence[int], seed: int, start: int = 0
) -> Iterator[list[int]]:
    """Endless batches with `sizes[k]` indices out of source k of `counts[k]` examples; indices
    count through the sources joined one after the other."""
    offsets = [sum(counts[:k]) for k in range(len(counts))]
    streams = [batches(c, s, seed, start) for c, s in zip(counts, sizes, strict=True) if s]
    used = [o for o, s in zip(offsets, sizes, strict=True) if s]
    while True:
        yield [o + i for o, stream in zip(used, streams, strict=True) for i in next(stream)]


def merge(sources: Sequence[Sequence[Example]]) -> list[Example]:
    """Examples of all sources; those of one picture (same key) become one, texts together."""
    merged: dict[str, Example] = {}
    for source in sources:
        for e in source:
            if e.key in merged:
                old = merged[e.key]
                e = replace(old, texts=old.texts + e.texts)
            merged[e.key] = e
    return list(merged.values())


def random_resized_crop(picture: Image.Image, draw: random.Random) -> Image.Image:
    """The published training's augmentation: a part of 50 to 100 % of the area, with an aspect
    ratio of 3:4 to 4:3, which `vision.preprocess` then squashes to the encoder's size."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * draw.uniform(0.5, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return picture.crop((left, top, left + w, top + h))
    return picture
