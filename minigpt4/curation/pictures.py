"""The pictures of a set: files in a folder, or members of WebDataset shards. No torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minigpt4.data.files import local_path
from minigpt4.data.names import is_hidden
from minigpt4.data.shards import expand, members, read_member
from minigpt4.errors import UserError, say
from minigpt4.model import image
from minigpt4.model.image import Picture

IN_SHARD = ".tar:"  # SHARD.tar:MEMBER
NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|\0]|^\.')  # not allowed in file names on some systems


@dataclass(frozen=True)
class PictureFile:
    """A picture. image_id: the name of its file after export. picture: a path or
    SHARD.tar:MEMBER."""

    image_id: str
    picture: str


def find_pictures(where: str) -> list[PictureFile]:
    """The pictures of a folder (not of folders in it), of one file, or of shards, in order.

    where: a path; for shards also a glob or a brace range. Ids are the names of the files, with "-"
    for characters that are not allowed in file names on some systems.
    """
    path = local_path(where)
    if path.suffix != ".tar" and (path.exists() or not any(c in where for c in "*?{")):
        inner = [p for p in path.glob("*/*") if image.has_picture_name(p.name)]
        if inner := [p for p in inner if not is_hidden(p.parent.name)]:
            say(f"Pictures in folders of {path} are left out ({len(inner):,}): name these folders.")
        files = [p.absolute() for p in image.list_pictures(path)]  # a link's name, not its target's
        return _named([(p.stem, str(p)) for p in files])
    found = []
    for shard in expand(where):
        for member in members(shard):
            if image.has_picture_name(member) and not is_hidden(member):
                stem = member.removeprefix("./").rsplit(".", 1)[0].replace("/", "-")
                found.append((f"{shard.stem}-{stem}", f"{shard.absolute()}:{member}"))
    if not found:
        raise UserError(
            f"{where} contains no pictures: name a folder of them, or WebDataset shards."
        )
    return _named(found)


def _named(found: Iterable[tuple[str, str]]) -> list[PictureFile]:
    """Give each picture an id that is unique even if case is ignored, as some file systems do."""
    sources: dict[int, PictureFile] = {}
    taken: Counter[str] = Counter()
    # Names that stay as they are come first, so that no changed name takes theirs.
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
        sources[place] = PictureFile(image_id, picture)
    return [sources[place] for place in sorted(sources)]


def locate(picture: str, moved_to: str | None = None) -> tuple[Path, str]:
    """The file that a record names, and its member; "" if the file is the picture itself.

    moved_to: the folder in which the pictures or shards are now.
    """
    path, in_shard, member = picture.partition(IN_SHARD)
    file = Path(path + in_shard.rstrip(":"))
    return (Path(moved_to, file.name) if moved_to else file), member


def is_same(picture: str, found: str) -> bool:
    """Does a record name the picture that was found, in its place or moved?

    It was moved if there is nothing in its old place, and the names of its file and folder are the
    same.
    """
    (then, then_member), (now, member) = locate(picture), locate(found)
    if then_member != member:
        return False
    if then == now or then.resolve() == now.resolve():
        return True
    return then.parts[-2:] == now.parts[-2:] and not os.path.exists(then)


def read_picture(picture: str, moved_to: str | None = None) -> bytes:
    """The content of the picture that a record names. UserError if it is missing.

    moved_to: as in `locate`.
    """
    file, member = locate(picture, moved_to)
    try:
        return read_member(file, member) if member else file.read_bytes()
    except (OSError, KeyError) as error:
        raise UserError(
            f"The picture {picture} is missing: if it was moved, name its folder with "
            "“--pictures FOLDER”."
        ) from error


def load_picture(picture: str, moved_to: str | None = None) -> Picture:
    """The decoded picture. UserError names it if it cannot be read."""
    content = read_picture(picture, moved_to)
    try:
        return image.load(content)
    except UserError as error:
        name = Path(picture).name
        raise UserError(str(error).replace("The picture", f"The picture {name}", 1)) from error
