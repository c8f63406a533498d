"""What counts as a caption, and the account of what a reader of data leaves out."""

import ast
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from minigpt4.errors import UserError, say

# Reasons to leave something out, as they follow a number: "7 without a caption".
NO_CAPTION = "without a caption"
NOT_TEXT = "with a caption that is not text"
NOT_UTF8 = "with a caption that is not in UTF-8"
NOT_JSON = "with damaged JSON"
OTHER_KIND = "of a kind that is not read"
NO_PICTURE = "without a picture"
SEVERAL_PICTURES = "with several pictures"
SAME_NAME = "with the name of another picture"
MISSING = "with a missing picture"
TOOLS = "with calls of tools"

MOST_MISSING = 0.1  # of the pictures that a table names: more are a mistake in the paths
NAMED = 3  # of what is left out for one reason; the others are only counted

# Fields that may hold a caption or captions; the first one that does counts.
FIELDS = (
    "captions",
    "caption",
    "text",
    "texts",
    "description",
    "answer",
    "response",
    "output",
    "comment",
)
# What programs write into a cell that has no value.
_EMPTY_CELLS = {"nan", "NaN", "null", "NULL", "None", "#N/A", "N/A", "<NA>"}
_STRING = r"'(?:[^'\\]|\\.)*'" + r'|"(?:[^"\\]|\\.)*"'
# A list as Python, JSON or NumPy (without commas) write it into a table's cell.
_LIST = re.compile(rf"\[[\s,]*(?:(?:{_STRING}|None|null|nan)[\s,]*)*\]", re.DOTALL)

Read = TypeVar("Read")


def captions_in(value: object) -> list[str]:
    """The captions in a field: a string, a list of strings, nested to any depth, or a list's text.

    Blank strings, null and NaN are no captions. ValueError for any other value.
    """
    if value is None or value != value:
        return []
    if isinstance(value, list | tuple):
        return [caption for item in value for caption in captions_in(item)]
    if not isinstance(value, str):
        raise ValueError
    text = value.strip()
    if text in _EMPTY_CELLS or not text:
        return []
    if _LIST.fullmatch(text):
        return [c for s in re.findall(_STRING, text, re.DOTALL) for c in captions_in(_unquoted(s))]
    if text.startswith(("['", '["')) and text.endswith("]"):
        raise ValueError  # a list with something other than strings
    return [text]


def _unquoted(text: str) -> str:
    try:
        return ast.literal_eval(text.replace("\r", "\\r").replace("\n", "\\n"))
    except SyntaxError:
        raise ValueError from None


def choose_captions(values: Iterable[object]) -> tuple[tuple[str, ...], str]:
    """The captions of the first of several sources that has any; if none has, the reason."""
    reason = NO_CAPTION
    for value in values:
        try:
            found = captions_in(value)
        except ValueError:
            reason = NOT_TEXT
        else:
            if found:
                return tuple(found), ""
    return (), reason


class Reading:
    """Counts what a reader leaves out of `source`, and reports it to the user at the end."""

    def __init__(self, source: object) -> None:
        self._source = source
        self._left_out: dict[str, list[str]] = {}

    def leave_out(self, name: str, reason: str) -> None:
        """Count something that is left out. name: what the user finds it by."""
        self._left_out.setdefault(reason, []).append(name)

    def finish(self, read: Sequence[Read], needs: str) -> list[Read]:
        """Report what was read, and return it.

        needs: what the source must contain. UserError if nothing was read, or if more than
        `MOST_MISSING` of the pictures are missing.
        """
        missing = self._left_out.get(MISSING, [])
        if len(missing) > MOST_MISSING * (len(read) + len(missing)):
            raise UserError(
                f"{len(missing):,} of {len(read) + len(missing):,} pictures that {self._source} "
                f"names are missing: {_first(missing)}. Check the paths."
            )
        if not read:
            why = f" ({self.summary()})" if self._left_out else ""
            raise UserError(f"{self._source} contains no pictures with captions{why}: {needs}.")
        noun = "picture" if len(read) == 1 else "pictures"
        left_out = f"; {self.summary()}" if self._left_out else ""
        say(f"{self._source}: {len(read):,} {noun} read{left_out}.")
        return list(read)

    def summary(self) -> str:
        """Such as "12 left out: 7 without a caption (a, b, c, …), 5 of a kind that is not read"."""
        count = sum(map(len, self._left_out.values()))
        reasons = (f"{len(n):,} {why} ({_first(n)})" for why, n in self._left_out.items())
        return f"{count:,} left out: {', '.join(reasons)}"


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown + (", …" if len(names) > NAMED else "")
