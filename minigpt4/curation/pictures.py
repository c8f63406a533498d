"""Where the pictures of a set are: files of a folder, or members of WebDataset shards. No torch."""

import functools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture
from minigpt4.training.data import PICTURE_SUFFIXES, expand

IN_SHARD = ".tar:"  # SHARD.tar:MEMBER
NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|\0]|^\.')  # of files, on one system or another


@dataclass(frozen=True)
class Source:
    """A picture: `image_id`, which is to be its file's name; `picture`, a path or
    SHARD.tar:MEMBER."""

    image_id: str
    picture: str


def find_pictures(where: str) -> list[Source]:
    """The pictures of a folder (not of folders in it), of one file, or of shards, in order.

    where: a path, or for shards a glob or a brace range too. Ids come from the files' names, with
    "-" for what another system's files cannot be named.
    """
    path = Path(where).expanduser()
    if path.suffix != ".tar" and (path.exists() or not any(c in where for c in "*?{")):
        files = [p.resolve() for p in image.list_pictures(path)]
        return _named([(p.stem, str(p)) for p in files])
    found = []
    for shard in map(Path, expand(where)):
        for member in _members(shard):
            if Path(member).suffix.lower().lstrip(".") in PICTURE_SUFFIXES:
                stem = member.removeprefix("./").rsplit(".", 1)[0].replace("/", "-")
                found.append((f"{shard.stem}-{stem}", f"{shard.resolve()}:{member}"))
    if not found:
        raise UserError(f"{where} holds no pictures: give a folder of them, or WebDataset shards.")
    return _named(found)


def _named(found: Iterable[tuple[str, str]]) -> list[Source]:
    """Ids that are unique also where letters' case is not told apart, as on some disks."""
    sources, taken = {}, Counter()
    # Names that can stay as they are come first, so that no other takes theirs.
    for place, (name, picture) in sorted(
        enumerate(found), key=lambda item: bool(NOT_IN_NAMES.search(item[1][0]))
    ):
        name = NOT_IN_NAMES.sub("-", name)
        taken[name.casefold()] += 1
        times = taken[name.casefold()]
        while times > 1 and f"{name}-{times}".casefold() in taken:
            times += 1
        image_id = name if times == 1 else f"{name}-{times}"
        taken[image_id.casefold()] += times > 1
        sources[place] = Source(image_id, picture)
    return [sources[place] for place in sorted(sources)]


def locate(picture: str, moved_to: str | None = None) -> tuple[Path, str]:
    """The file that a record names, and the member of it: "" where the file is the picture.

    moved_to: the folder where the pictures, or the shards, are now.
    """
    path, in_shard, member = picture.partition(IN_SHARD)
    file = Path(path + in_shard.rstrip(":"))
    return (Path(moved_to, file.name) if moved_to else file), member


def is_same(picture: str, found: str) -> bool:
    """Whether what a record names is the picture that was found, in its place or moved.

    Moved: nothing is where it was, and the names of the file and of its folder are the same.
    """
    (then, then_member), (now, member) = locate(picture), locate(found)
    if then_member != member:
        return False
    if then == now or then.resolve() == now.resolve():
        return True
    return then.parts[-2:] == now.parts[-2:] and not os.path.exists(then)


def read_picture(picture: str, moved_to: str | None = None) -> bytes:
    """The content of the picture that a record names; UserError where there is none.

    moved_to: as in `locate`.
    """
    file, member = locate(picture, moved_to)
    try:
        if not member:
            return file.read_bytes()
        offset, size = _members(file)[member]
        with file.open("rb") as shard:
            shard.seek(offset)
            return shard.read(size)
    except (OSError, KeyError) as error:
        raise UserError(
            f"The picture {picture} is not there any more: say where by “--pictures FOLDER”."
        ) from error


def load_picture(picture: str, moved_to: str | None = None) -> Picture:
    """The decoded picture; UserError names it where it cannot be read."""
    try:
        return image.load(read_picture(picture, moved_to))
    except UserError as error:
        name = Path(picture).name
        raise UserError(str(error).replace("The picture", f"The picture {name}", 1)) from error


@functools.lru_cache(maxsize=256)
def _members(shard: Path) -> dict[str, tuple[int, int]]:
    """Name of each file in a shard -> (offset, size)."""
    try:
        with tarfile.open(shard, "r:") as tar:
            return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    except tarfile.TarError as error:
        raise UserError(
            f"{shard} is no readable, uncompressed tar shard: fetch it again, or unpack it."
        ) from error
