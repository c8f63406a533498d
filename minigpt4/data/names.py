"""Picture files by the names that tables and annotations use, which may come from other systems."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from minigpt4.model.image import has_picture_name

_ROOT = re.compile(r"(?i)^(file://)?(/|[a-z]:/|//)")


def is_hidden(name: str) -> bool:
    """Whether a path contains a hidden name, such as AppleDouble's "._a.jpg" or "__MACOSX"."""
    parts = PurePosixPath(name).parts
    return any(p == "__MACOSX" or (p.startswith(".") and p.strip(".")) for p in parts)


class PictureFinder:
    """Finds pictures in the first of several folders that contains them.

    A name is found as it stands, with backslashes for slashes, in another Unicode normalization or
    case, and with another picture ending or without one, unless that leaves a choice. Of an
    absolute path from another machine, the longest end that exists counts.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._listings: dict[Path, _Listing] = {}

    def find(self, name: str) -> Path | None:
        """The file; None if there is none, or if it is ambiguous."""
        name = name.strip().strip("\"'")
        for folder in self._folders:
            if name and is_file(folder / name):
                return folder / name
        name = name.replace("\\", "/")
        parts = _ROOT.sub("", name).split("/")
        ends = range(len(parts)) if _ROOT.match(name) else range(1)
        for first in ends:
            for folder in self._folders:
                if found := self._descend(folder, parts[first:]):
                    return found
        return None

    def _descend(self, folder: Path, parts: list[str]) -> Path | None:
        for part in parts[:-1]:
            if part in ("", "."):
                continue
            inner = ".." if part == ".." else self._list(folder).exact(part)
            if inner is None:
                return None
            folder = folder / inner
        listing = self._list(folder)
        names = (listing.exact(parts[-1]), listing.with_other_ending(parts[-1]))
        return next((folder / n for n in names if n and is_file(folder / n)), None)

    def _list(self, folder: Path) -> "_Listing":
        if folder not in self._listings:
            self._listings[folder] = _Listing(folder)
        return self._listings[folder]


class _Listing:
    """The names in a folder, by their folded forms."""

    def __init__(self, folder: Path) -> None:
        self._names: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}  # of pictures, without their endings
        for name in _names_in(folder):
            self._names.setdefault(_folded(name), []).append(name)
            if has_picture_name(name):
                self._stems.setdefault(_folded(name.rpartition(".")[0]), []).append(name)

    def exact(self, name: str) -> str | None:
        """The name itself, or the only one that differs in normalization or case alone."""
        found = self._names.get(_folded(name), [])
        normal = [n for n in found if _normal(n) == _normal(name)]
        return name if name in found else _only(normal) or _only(found)

    def with_other_ending(self, name: str) -> str | None:
        """The only picture with this name before its ending."""
        if added := self._stems.get(_folded(name)):
            return _only(added)
        if not has_picture_name(name):
            return None
        return _only(self._stems.get(_folded(name.rpartition(".")[0]), []))


def _names_in(folder: Path) -> Iterator[str]:
    try:
        yield from sorted(p.name for p in folder.iterdir() if not is_hidden(p.name))
    except OSError:
        return


def is_file(path: Path) -> bool:
    """Whether there is a file, also at the end of links; False for what cannot be a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a null byte
        return False


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _normal(_normal(name).casefold())


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None
