"""Where the pictures of a set are: files of a folder, or members of WebDataset shards. No torch."""

import functools
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt4 import image
from minigpt4.errors import UserError
from minigpt4.image import Picture
from minigpt4.training.data import PICTURE_SUFFIXES, expand

IN_SHARD = ".tar:"  # SHARD.tar:MEMBER


@dataclass(frozen=True)
class Source:
    """A picture: `image_id`, which is to be its file's name; `picture`, a path or
    SHARD.tar:MEMBER."""

    image_id: str
    picture: str


def find_pictures(where: str) -> list[Source]:
    """The pictures of a folder (not of folders in it), of one file, or of shards, in order.

    where: a path, or for shards a glob or a brace range too. Ids come from the files' names.
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
    sources, taken = [], Counter()
    for name, picture in found:
        taken[name.casefold()] += 1
        times = taken[name.casefold()]
        while times > 1 and f"{name}-{times}".casefold() in taken:
            times += 1
        image_id = name if times == 1 else f"{name}-{times}"
        taken[image_id.casefold()] += times > 1
        sources.append(Source(image_id, picture))
    return sources


def read_picture(picture: str, moved_to: str | None = None) -> bytes:
    """The content of the file that a record names.

    moved_to: the folder where the pictures, or the shards, are now. UserError where there is none.
    """
    path, in_shard, member = picture.partition(IN_SHARD)
    file = Path(path + in_shard.rstrip(":"))
    if moved_to:
        file = Path(moved_to, file.name)
    try:
        if not in_shard:
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
