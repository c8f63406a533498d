"""Pictures with texts: from shards, or in the published layout of the second stage."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.data import captions
from minigpt4.data.captions import NotUsable, Reading, choose_captions
from minigpt4.data.files import (
    decode,
    load_json,
    parse_jsonl,
    printable,
    read_bytes,
    read_json,
    read_text,
    repeated_in,
    repeated_names,
    sample_of,
    shortened,
)
from minigpt4.data.names import PictureFinder, folded, is_hidden
from minigpt4.data.shards import expand, members, names_of, read_at
from minigpt4.errors import UserError, say
from minigpt4.model import image

MOST_UNUSABLE = 0.5  # of the pictures: with more, a result would be about something else
LONGEST_PATH = 4096  # characters; a longer "name" is a picture's content
_SHARD_BLOCKS = 64  # blocks of a shard that are read to tell it from others
NAMED = 10  # pictures that cannot be used; the others are only counted


@dataclass(frozen=True)
class Text:
    """A text to learn: `answer` to one of `instructions` (if empty, to those of the stage).

    earlier: the turns of the conversation before it, (question, answer) each.
    """

    answer: str
    instructions: tuple[str, ...] = ()
    earlier: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Example:
    """A picture and its texts; `read` returns the content of the picture's file."""

    key: str  # "shard/name" or the id: unique in a data set
    read: Callable[[], bytes]
    texts: tuple[Text, ...]
    captions: tuple[str, ...] = ()
    sample: Callable[[], str] = str  # computes `version`, when it is first needed

    @cached_property
    def version(self) -> str:
        """Changes with the picture's file, but not with the place or the time of a copy."""
        return self.sample()

    def picture(self) -> Image.Image:
        """The decoded picture in RGB. UserError names it if it cannot be read."""
        try:
            return image.load(self.read()).rgb
        except UserError as error:
            raise UserError(
                f"Picture {shortened(self.key)} of the data cannot be used: {error}"
            ) from error


def with_instructions(examples: Iterable[Example], instructions: tuple[str, ...]) -> list[Example]:
    """The examples, with these instructions for captions that have none."""

    def asked(text: Text, captions: tuple[str, ...]) -> Text:
        given = text.instructions or text.answer not in captions
        return text if given else replace(text, instructions=instructions)

    return [replace(e, texts=tuple(asked(t, e.captions) for t in e.texts)) for e in examples]


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples whose pictures can be decoded. The others are reported to the user.

    UserError if there are none, or if more than `MOST_UNUSABLE` cannot be decoded.
    """
    found, unusable = [], 0
    for example in examples:
        try:
            example.picture()
        except UserError as error:
            unusable += 1
            if unusable <= NAMED:
                say(str(error))
        else:
            found.append(example)
    if not found:
        raise UserError("None of the pictures can be used: provide readable ones.")
    if unusable:
        check_share(unusable, len(examples))
        say(f"{unusable} of {len(examples)} pictures cannot be used and are left out.")
    return found


def check_share(unusable: int, count: int) -> None:
    """UserError if more than `MOST_UNUSABLE` of `count` pictures cannot be used."""
    if unusable > MOST_UNUSABLE * count:
        raise UserError(
            f"{unusable} of {count} pictures cannot be used, which is more than "
            f"{MOST_UNUSABLE:.0%}: provide readable ones."
        )


def merge(examples: Iterable[Example]) -> list[Example]:
    """The examples; those with the same key become one, with all their texts."""
    merged: dict[str, Example] = {}
    for e in examples:
        if old := merged.get(e.key):
            e = replace(old, texts=old.texts + e.texts)
        merged[e.key] = e
    return list(merged.values())


def read_shards(pattern: str) -> list[Example]:
    """WebDataset shards as img2dataset writes them: KEY.jpg beside KEY.json or KEY.txt.

    pattern: a path, a glob or a brace range ("train-{00000..00007}.tar"). Only the index and the
    captions are kept in memory; a picture is read from the shard when it is needed.
    """
    reading = Reading(pattern)
    shards = expand(pattern)
    found = [
        example
        for shard, name in zip(shards, names_of(shards), strict=True)
        for example in _read_shard(shard, name, reading)
    ]
    return reading.finish(found, "it needs KEY.jpg beside KEY.json or KEY.txt")


def _read_shard(shard: Path, shard_name: str, reading: Reading) -> Iterator[Example]:
    index = members(shard)
    # Once for all pictures of the shard: there may be millions.
    whole = sample_of(shard, _SHARD_BLOCKS)

    def read(name: str) -> bytes:
        return read_at(shard, *index[name])

    for key, name, found in captioned_files(index, read, reading):
        texts = tuple(map(Text, found))
        picture = partial(read_at, shard, *index[name])
        sample = partial("{} {} {}".format, whole, *index[name])
        yield Example(f"{shard_name}/{key}", picture, texts, found, sample)


def captioned_files(
    names: Iterable[str], read: Callable[[str], bytes], reading: Reading
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(key, picture's name, captions) of KEY.jpg beside KEY.json or KEY.txt, the JSON first.

    An ending begins at the last dot of a name. Hidden files do not count; other files, such as
    KEY.svg or KEY.cls, are reported as left out unless KEY has a picture.
    """
    pictures: dict[str, str] = {}
    texts: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        key = stem.removeprefix("./")
        if is_hidden(name):
            continue
        if image.has_picture_name(name):
            if key in pictures:
                reading.leave_out(name, captions.SAME_NAME)
            else:
                pictures[key] = name
        elif suffix.lower() in ("json", "txt"):
            texts.setdefault(key, {})[suffix.lower()] = name
        else:
            others.setdefault(key, name)
    _match_folded(pictures, texts)
    for key, name in pictures.items():
        found, reason = _captions_beside(texts.get(key, {}), read)
        if found:
            yield key, name, found
        else:
            reading.leave_out(name, reason)
    for key, name in others.items():
        if key not in pictures:
            reading.leave_out(name, captions.OTHER_KIND)
    for key, beside in texts.items():
        if key not in pictures and key not in others:
            reading.leave_out(next(iter(beside.values())), captions.NO_PICTURE)


def _match_folded(pictures: Iterable[str], texts: dict[str, dict[str, str]]) -> None:
    """Give a picture without texts those of the one key that differs in case or Unicode form, if no
    other such picture could have them."""
    alike: dict[str, tuple[list[str], list[str]]] = {}
    for key in texts.keys() ^ set(pictures):
        alike.setdefault(folded(key), ([], []))[key in texts].append(key)
    for lacking, spare in alike.values():
        if len(lacking) == len(spare) == 1:
            texts[lacking[0]] = texts.pop(spare[0])


def _captions_beside(
    texts: dict[str, str], read: Callable[[str], bytes]
) -> tuple[tuple[str, ...], str]:
    """The captions of KEY.json, or else KEY.txt; if there are none, the reason."""
    reason = captions.NO_CAPTION
    for suffix in ("json", "txt"):
        if suffix not in texts:
            continue
        try:
            content = decode(read(texts[suffix]))
            value = load_json(content) if suffix == "json" else content
            fields = fields_of(once(value))
        except UnicodeDecodeError:
            reason = captions.NOT_UTF8
        except (ValueError, RecursionError):
            reason = captions.NOT_JSON
        except NotUsable as error:
            reason = str(error)
        else:
            found, why = choose_captions(fields)
            if found:
                return found, ""
            reason = why if reason == captions.NO_CAPTION else reason
    return (), reason


def once(record: Any) -> Any:
    """The record. NotUsable if it has a field more than once, of which only one would be read."""
    if repeated_in(record) is not None:
        raise NotUsable(captions.REPEATED)
    return record


def fields_of(record: object) -> list[object]:
    """The values of a record's caption fields in the order in which they are tried. Any other value
    is returned itself. "caption_2" is a part of "caption". NotUsable if it has one in two cases."""
    if not isinstance(record, dict):
        return [record]
    names = [str(name).strip().casefold() for name in record]
    named = dict(zip(names, record.values(), strict=True))
    if len(named) < len(names) and any(map(captions.is_field, repeated_names(names))):
        raise NotUsable(captions.REPEATED)
    if more := [named[name] for name in named if captions.NUMBERED.fullmatch(name)]:
        named["caption"] = [named.get("caption"), *more]
    return [named[name] for name in captions.FIELDS if name in named]


def read_descriptions(folder: str | Path) -> list[Example]:
    """The published layout of the second stage: `filter_cap.json` and `image/ID.jpg`; the pictures
    may also be in `images/` or beside the file."""
    folder = Path(folder)
    content = read_json(folder / "filter_cap.json")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(
            f"{printable(folder)} is not in the layout of the second stage: it needs "
            "filter_cap.json with “annotations” of “image_id” and “caption”, and the pictures as "
            "image/ID.jpg; or a table of captions (CSV or JSON lines) beside the pictures."
        )
    collected = Collected(folder / "filter_cap.json", _described_in(folder))
    for number, annotation in enumerate(annotations, 1):
        record = annotation if isinstance(annotation, dict) else {}
        with collected.reading.record(f"annotation {number}"):
            key = picture_name(once(record).get("image_id"))
            found, reason = choose_captions([record.get("caption")])
            shown = key if image.has_picture_name(key) else f"image/{key}.jpg"
            collected.add(key, tuple(map(Text, found)), reason, shown=shown)
    return collected.finish("every annotation needs a caption and image/ID.jpg")


def read_instructions(file: str | Path, folder: str | Path) -> list[Example]:
    """JSON lines {"image_id", "pairs": [{"instruction", "answer"}]}; pictures in folder/image, as
    for `read_descriptions`."""
    collected = Collected(file, _described_in(Path(folder)))
    lines = parse_jsonl(file, read_text(file), "image_id", "pairs", repeated=True)
    for number, record in lines:
        with collected.reading.record(f"line {number}"):
            key = picture_name(once(record)["image_id"])
            pairs = record["pairs"] if isinstance(record["pairs"], list) else []
            for pair in (pair if isinstance(pair, dict) else {} for pair in pairs or [{}]):
                questions, reason = choose_captions([pair.get("instruction")], cells=False)
                answers, why = choose_captions([pair.get("answer")], cells=False)
                texts = tuple(Text(a, questions) for a in answers if questions)
                collected.add(key, texts, why or reason, shown=f"line {number}: {key}")
    return collected.finish(
        "every line needs an “image_id”, “pairs” of “instruction” and “answer”, and image/ID.jpg"
    )


def _described_in(folder: Path) -> list[list[Path]]:
    return [[folder], [folder / "image"], [folder / "images"]]


def picture_name(value: object, reason: str = captions.NO_ID) -> str:
    """An id or name of a picture as text. NotUsable if it is neither text nor an integer."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise NotUsable(reason)
    return str(value)


class Collected:
    """Collects the texts of pictures from an annotation file, in the order of first appearance.

    folders: where the pictures are looked for, as in `PictureFinder`. by_path: a picture's key is
    its path relative to the first folder; otherwise it is the name that the file uses.
    """

    def __init__(
        self, source: str | Path, folders: Sequence[Sequence[Path]], by_path: bool = False
    ) -> None:
        self.reading = Reading(source, searched_in(folders))
        self._finder = PictureFinder(folders)
        self._root, self._by_path = folders[0][0], by_path
        self._paths: dict[str, Path | None] = {}  # by name
        self._found: dict[Path, Example] = {}

    def add(
        self,
        name: str,
        texts: tuple[Text, ...],
        reason: str = captions.NO_CAPTION,
        found: tuple[str, ...] = (),
        shown: str = "",
    ) -> None:
        """Add the texts of the picture `name`; without texts it is left out for this reason.

        found: captions among them. shown: the record's name in messages.
        """
        shown = shown or name
        if name not in self._paths:
            found_files = self._finder.find(name) if len(name) <= LONGEST_PATH else []
            self._paths[name] = found_files[0] if len(found_files) == 1 else None
            if len(found_files) > 1:
                some = " or ".join(_relative(p, self._root) for p in found_files[:2])
                self.reading.leave_out(f"{shown}, which is {some}", captions.AMBIGUOUS)
            elif not found_files:
                self.reading.leave_out(shown, _why_not_found(name))
        if (path := self._paths[name]) is None:
            return
        if not texts:
            self.reading.leave_out(shown, reason)
        elif old := self._found.get(path):
            self._found[path] = replace(old, texts=old.texts + texts, captions=old.captions + found)
        else:
            key = _relative(path, self._root) if self._by_path else name.strip()
            read = partial(read_bytes, path)
            self._found[path] = Example(key, read, texts, found, partial(sample_of, path))

    def finish(self, needs: str) -> list[Example]:
        """The examples, reported as by `Reading.finish`."""
        return self.reading.finish([*self._found.values()], needs)


def searched_in(folders: Sequence[Sequence[Path]]) -> str:
    """The folders in which pictures are looked for, for a message: the first one, and the paths of
    the others from there."""
    root = folders[0][0]
    others = [_relative(f, root) for group in folders for f in group if f != root and f.is_dir()]
    shown = ", ".join(map(shortened, others[:NAMED])) + (", …" if len(others) > NAMED else "")
    return f"{printable(root)}{' and in ' if others else ''}{shown}"


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _why_not_found(name: str) -> str:
    """The reason to leave out a picture that is in no folder."""
    if name[:5].lower() == "data:" or len(name) > LONGEST_PATH:
        return captions.INSIDE
    elsewhere = re.match("(?i)(?!file:)[a-z][a-z0-9+.-]*://", name)  # also s3://
    return captions.ON_WEB if elsewhere else captions.MISSING
