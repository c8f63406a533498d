"""WebDataset shards: uncompressed tar files, indexed once and read at offsets."""

import glob
import re
import tarfile
from functools import lru_cache
from pathlib import Path

from minigpt4.data.files import version_of
from minigpt4.errors import UserError


def expand(pattern: str) -> list[Path]:
    """The shards of a path, a glob or a brace range such as "train-{00000..00007}.tar".

    UserError if one of them is missing.
    """
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
    return [Path(p) for p in paths]


def members(shard: Path) -> dict[str, tuple[int, int]]:
    """The name of each file in a shard -> (offset, size) in bytes.

    UserError if the shard is damaged, or compressed: then it has no offsets.
    """
    return _index(shard, version_of(shard))


@lru_cache(maxsize=256)
def _index(shard: Path, version: str) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} is not a readable, uncompressed tar file: download it again, or unpack it."
        ) from error


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset`. UserError if it cannot be read."""
    try:
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror}): check the path.") from error


def read_member(shard: Path, name: str) -> bytes:
    """The content of a file in a shard. KeyError if the shard has no file of this name."""
    return read_at(shard, *members(shard)[name])
