"""Pictures with texts: from shards, tables, or the published layout of the second stage."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from minigpt4.data.files import parse_jsonl, read_text, version_of
from minigpt4.data.shards import PICTURE_SUFFIXES, expand, members, read_at
from minigpt4.errors import UserError, say
from minigpt4.model import image


@dataclass(frozen=True)
class Text:
    """A text to learn: `answer` to one of `instructions` (if empty, to those of the stage)."""

    answer: str
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A picture and its texts; `read` returns the content of the picture's file."""

    key: str  # "shard/name" or the id: unique in a data set
    read: Callable[[], bytes]
    texts: tuple[Text, ...]
    captions: tuple[str, ...] = ()
    version: str = ""  # changes whenever the picture's file changes

    def picture(self) -> Image.Image:
        """The decoded picture in RGB. UserError names it if it cannot be read."""
        try:
            return image.load(self.read()).rgb
        except UserError as error:
            raise UserError(f"Picture {self.key} of the data cannot be used: {error}") from error


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples whose pictures can be decoded. The others are reported to the user.

    UserError if there are none.
    """
    found = []
    for example in examples:
        try:
            example.picture()
        except UserError as error:
            say(str(error))
        else:
            found.append(example)
    if not found:
        raise UserError("None of the pictures can be used: provide readable ones.")
    if unusable := len(examples) - len(found):
        say(f"{unusable} of {len(examples)} pictures cannot be used and are left out.")
    return found


def merge(sources: Sequence[Sequence[Example]]) -> list[Example]:
    """The examples of all sources; those with the same key become one, with all their texts."""
    merged: dict[str, Example] = {}
    for source in sources:
        for e in source:
            if e.key in merged:
                old = merged[e.key]
                e = replace(old, texts=old.texts + e.texts)
            merged[e.key] = e
    return list(merged.values())


def read_shards(pattern: str, instructions: tuple[str, ...] = ()) -> list[Example]:
    """WebDataset shards as img2dataset writes them: KEY.jpg beside KEY.json or KEY.txt.

    pattern: a path, a glob or a brace range ("train-{00000..00007}.tar"). Only the index and the
    captions are kept in memory; a picture is read from the shard when it is needed.
    """
    examples = [e for shard in expand(pattern) for e in _read_shard(shard, instructions)]
    if not examples:
        raise UserError(
            f"{pattern} contains no pictures with captions (KEY.jpg beside KEY.json or KEY.txt)."
        )
    return examples


def _read_shard(shard: Path, instructions: tuple[str, ...]) -> Iterator[Example]:
    pictures: dict[str, tuple[int, int]] = {}
    captions: dict[str, list[str]] = {}
    for member, place in members(shard).items():
        folder, _, name = member.rpartition("/")
        key, _, suffix = name.partition(".")
        key, suffix = f"{shard.stem}/{folder}/{key}".replace("/./", "/"), suffix.lower()
        key = key.replace("//", "/")
        if suffix in PICTURE_SUFFIXES:
            pictures[key] = place
        elif suffix == "json":
            captions[key] = _captions_of(shard, member, read_at(shard, *place))
        elif suffix == "txt":
            captions.setdefault(key, [read_at(shard, *place).decode("utf-8", "replace").strip()])
    version = version_of(shard)
    for key, (offset, size) in pictures.items():
        if found := tuple(captions.get(key, ())):
            read = partial(read_at, shard, offset, size)
            texts = tuple(Text(caption, instructions) for caption in found)
            yield Example(key, read, texts, found, f"{version} {offset}")


def _captions_of(shard: Path, member: str, content: bytes) -> list[str]:
    """The strings of "captions", a list, or of "caption"; none if the record has neither."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise UserError(f"{member} in {shard} is not JSON: correct or remove it.") from error
    if not isinstance(record, dict):
        return []
    found = record.get("captions") or record.get("caption") or []
    found = [found] if isinstance(found, str) else found
    return [c for c in found if isinstance(c, str) and c.strip()]


def read_descriptions(folder: str | Path) -> list[Example]:
    """The published layout of the second stage: `filter_cap.json` and `image/ID.jpg`."""
    folder = Path(folder)
    try:
        annotations = json.loads((folder / "filter_cap.json").read_text(encoding="utf-8-sig"))
        pairs = [(str(a["image_id"]), a["caption"]) for a in annotations["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not in the layout of the second stage: it needs filter_cap.json with "
            "“annotations” of “image_id” and “caption”, and the pictures as image/ID.jpg; or a "
            "table of captions (CSV or JSON lines) beside the pictures."
        ) from error
    return [_described(folder, key, (Text(caption),)) for key, caption in pairs]


def read_instructions(file: str | Path, folder: str | Path) -> list[Example]:
    """JSON lines {"image_id", "pairs": [{"instruction", "answer"}]}; pictures in folder/image."""
    records = parse_jsonl(file, read_text(file), "image_id", "pairs")
    try:
        found = [
            (str(r["image_id"]), tuple(Text(p["answer"], (p["instruction"],)) for p in r["pairs"]))
            for _, r in records
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not an instruction file: each line must be a JSON object with “image_id” "
            "and “pairs” of “instruction” and “answer”."
        ) from error
    return [_described(Path(folder), key, texts) for key, texts in found]


def _described(folder: Path, key: str, texts: tuple[Text, ...]) -> Example:
    path = folder / "image" / f"{key}.jpg"
    if not path.is_file():
        raise UserError(f"The picture {path} is missing: every image_id needs image/ID.jpg.")
    return Example(key, path.read_bytes, texts, version=version_of(path))
