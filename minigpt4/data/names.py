"""Picture files by the names that tables and annotations use, which may come from other systems."""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from minigpt4.model.image import has_picture_name

_ROOT = re.compile(r"(?i)^(file://)?(/|[a-z]:/|//)")


def is_hidden(name: str) -> bool:
    """Whether a path contains a hidden name, such as AppleDouble's "._a.jpg" or "__MACOSX"."""
    parts = PurePosixPath(name).parts
    return any(p == "__MACOSX" or (p.startswith(".") and p.strip(".")) for p in parts)


class PictureFinder:
    """Finds pictures in groups of folders; the first group that has the name counts.

    A name is found as written, without blanks and quotes around it, with backslashes for slashes,
    with differences that `folded` removes, and with another picture ending or without one. For an
    absolute path from another machine, the longest end that exists counts. If nothing is
    found, the name may be encoded as in a URL, or that of the file may, or be a number with ".0".
    """

    def __init__(self, groups: Sequence[Sequence[Path]]) -> None:
        self._groups = groups
        self._listings: dict[Path, _Listing] = {}

    def find(self, name: str) -> list[Path]:
        """The file; several if the name is ambiguous, for example in the folders of one group."""
        others = (path for other in _changed(name) for path in self._find([other]))
        return self._find(_readings(name)) or _distinct([*others])

    def _find(self, names: list[str]) -> list[Path]:
        for written in names:
            for group in self._groups:
                if found := [f / written for f in group if written and is_file(f / written)]:
                    return _distinct(found)
        for written in names:
            parts = _ROOT.sub("", written := written.replace("\\", "/")).split("/")
            for first in range(len(parts)) if _ROOT.match(written) else range(1):
                for group in self._groups:
                    if found := [p for f in group for p in self._descend(f, parts[first:])]:
                        return _distinct(found)
        return []

    def _descend(self, folder: Path, parts: list[str]) -> list[Path]:
        folders = [folder]
        for part in parts[:-1]:
            if part == "..":
                folders = [f / part for f in folders]
            elif part not in ("", "."):
                folders = [f / inner for f in folders for inner in self._list(f).exact(part)]
            if not folders:
                return []
        return [p for f in folders for p in self._files(f, parts[-1])]

    def _files(self, folder: Path, name: str) -> list[Path]:
        listing = self._list(folder)
        found = [folder / n for n in listing.exact(name)]
        found = [p for p in found if is_file(p)] or [
            folder / n for n in listing.with_other_ending(name)
        ]
        return [p for p in found if is_file(p)]

    def _list(self, folder: Path) -> "_Listing":
        if folder not in self._listings:
            self._listings[folder] = _Listing(folder)
        return self._listings[folder]


def _readings(name: str) -> list[str]:
    """The names that a written name may mean, in the order in which they are tried."""
    bare = name.strip().strip("\"'")
    found = [name, bare, _visible(bare)]
    if bare[:7].lower() == "file://":
        found.append(unquote(re.sub("(?i)^file://(localhost)?", "", bare)))
    return list(dict.fromkeys([*found, re.sub(r"(\.\w+)#\d+$", r"\1", bare)]))  # Flickr8k's a.jpg#0


def _changed(name: str) -> list[str]:
    """What programs may have made the name of, or of the name of its file: URLs, and numbers in a
    table with empty cells, which pandas writes as 1.0."""
    bare = name.strip().strip("\"'").replace("\\", "/")
    whole = re.sub(r"(?<![^/])(\d+)\.0(?=(\.\w+)?$)", r"\1", bare)
    found = dict.fromkeys([unquote(bare), quote(bare, errors="replace"), whole])
    return [changed for changed in found if changed != bare]


def _distinct(paths: list[Path]) -> list[Path]:
    """The paths without those that lead to the same file."""
    return paths if len(paths) == 1 else list({os.path.realpath(p): p for p in paths}.values())


class _Listing:
    """The names in a folder, by their folded forms."""

    def __init__(self, folder: Path) -> None:
        names: list[str] = []
        self._names: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}  # of pictures, without their endings
        with suppress(OSError):
            names = sorted(p.name for p in folder.iterdir() if not is_hidden(p.name))
        for name in names:
            self._names.setdefault(folded(name), []).append(name)
            if has_picture_name(name):
                self._stems.setdefault(folded(_stem(name)), []).append(name)

    def exact(self, name: str) -> list[str]:
        """The name itself, or else those that differ only in normalization, or else in case."""
        return _nearest(self._names.get(folded(name), []), name, str)

    def with_other_ending(self, name: str) -> list[str]:
        """The pictures with this name before their endings."""
        added = _nearest(self._stems.get(folded(name), []), name, _stem)
        if added or not has_picture_name(name):
            return added
        return _nearest(self._stems.get(folded(_stem(name)), []), _stem(name), _stem)


def _nearest(names: list[str], wanted: str, part: Callable[[str], str]) -> list[str]:
    """The names whose part is most similar to the wanted one."""
    for form in (str, _normal):
        if same := [name for name in names if form(part(name)) == form(wanted)]:
            return same
    return names


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def is_file(path: Path) -> bool:
    """Whether there is a file, also at the end of links; False if this cannot be a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a null byte
        return False


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name without differences that systems make and nobody sees: of case, Unicode form and kind
    of blank (macOS puts U+202F into a screenshot's name), and invisible characters (Windows puts
    U+202A before a copied path)."""
    if name.isascii():
        return name.casefold()
    blanks = "".join(" " if c.isspace() else c for c in _visible(name))
    return _normal(_normal(blanks).casefold())


def _visible(name: str) -> str:
    return "".join(c for c in name if unicodedata.category(c) != "Cf")
