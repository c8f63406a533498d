"""WebDataset shards: uncompressed tar files, indexed once and read at offsets."""

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from minigpt4.data.files import check_pointer, local_path, printable, version_of
from minigpt4.errors import UserError, say

MOST_SHARDS = 300_000  # the most that a pattern may name; LAION-5B has 230,000
_BRACE = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def expand(pattern: str) -> list[Path]:
    """The shards of a path, a glob, or ranges and lists in braces: "train-{00000..00007}.tar".

    UserError if one of them is missing, or if there are more than `MOST_SHARDS`.
    """
    path = local_path(pattern)
    if path.is_file():
        return [path]
    paths = sorted(glob.glob(str(path)))
    paths = paths or list(islice(_in_braces(str(path)), MOST_SHARDS + 1))
    if len(paths) > MOST_SHARDS:
        raise UserError(
            f"{printable(pattern)} names more than {MOST_SHARDS:,} shards: name fewer of them."
        )
    missing = [p for p in paths if not Path(p).is_file()]
    if missing or not paths:
        name = printable(missing[0] if missing else pattern)
        kind = "shard" if name.endswith(".tar") else "file or folder"
        raise UserError(f"There is no {kind} {name}: check the path.")
    return [Path(p) for p in dict.fromkeys(paths)]


def names_of(shards: Sequence[Path]) -> list[str]:
    """A unique name for each shard: without its ending and, if several share that, with its folders
    below their common folder."""
    stems = [shard.stem for shard in shards]
    if len({*stems}) == len(shards):
        return stems
    common = os.path.commonpath([shard.parent.absolute() for shard in shards])
    paths = [shard.absolute().relative_to(common) for shard in shards]
    names = [path.with_suffix("").as_posix() for path in paths]
    return names if len({*names}) == len(shards) else [path.as_posix() for path in paths]


def _in_braces(pattern: str) -> Iterator[str]:
    """Each name that a pattern with ranges and lists in braces stands for."""
    brace = _BRACE.search(pattern)
    if not brace:
        yield pattern
        return
    first, last, listed = brace.groups()
    numbers = range(int(first), int(last) + 1) if first else ()
    for inside in listed.split(",") if listed else (str(n).zfill(len(first)) for n in numbers):
        yield from _in_braces(pattern[: brace.start()] + inside + pattern[brace.end() :])


def members(shard: Path) -> dict[str, tuple[int, int]]:
    """The name of each file in a shard -> (offset, size) in bytes. A link has those of its
    target; a link whose target is not in the shard counts as an empty file.

    UserError if the shard is damaged, or compressed: then it has no offsets.
    """
    return _index(shard, version_of(shard))


@lru_cache(maxsize=256)
def _index(shard: Path, version: str) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            found = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
            links = {m.name: _target(m) for m in tar if m.islnk() or m.issym()}
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        check_pointer(shard)
        raise UserError(
            f"{printable(shard)} is not a readable, uncompressed tar file: download it again, or "
            "unpack it."
        ) from error
    if read_at(shard, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        say(
            f"{printable(shard)} is damaged or cut short after {len(found):,} files (no end mark "
            "follows): if there should be more, download it again."
        )
    by_path = {posixpath.normpath(name): place for name, place in found.items()}
    return found | {name: by_path.get(target, (0, 0)) for name, target in links.items()}


def _target(link: tarfile.TarInfo) -> str:
    """The file that a link leads to. A hard link's target is given by its name in the shard."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset`. UserError if it cannot be read."""
    try:
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(
            f"{printable(shard)} cannot be read ({error.strerror}): check the path."
        ) from error


def read_member(shard: Path, name: str) -> bytes:
    """The content of a file in a shard. KeyError if the shard has no file of this name."""
    return read_at(shard, *members(shard)[name])
