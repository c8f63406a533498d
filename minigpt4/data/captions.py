"""Checks of captions, and reports of the records that a reader of data leaves out."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from minigpt4.data.files import printable, shortened
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
AMBIGUOUS = "with a name that several pictures have"
INSIDE = "with a picture inside the file"
ON_WEB = "with a picture on the web"
IN_TEXT = "with a picture named inside the text (<img>…</img>), which is not read"
MARKS = "with more marks of pictures (<image>) than pictures"
NO_ID = "without an “image_id”"
NO_OWN_ID = "without a usable “id” or “file_name”"
SAME_ID = "with an “image_id” that several pictures have"
NOT_LISTED = "with an “image_id” that is not in “images”"
BOXES = "with boxes, which are not read"
VIDEO = "with a video or sound"
TOOLS = "with calls of tools"
UNKNOWN_ROLE = "with an unknown role"
BAD = "marked as bad (“label” or “kto_tag” false)"
REJECTED = "marked as rejected (“is_rejected”)"
PREFERENCES = "with a chosen and a rejected answer, which are not read"
ANSWERS = "with several “answers”, of which the one to learn is to be named “answer”"
NOT_LEARNED = "whose answers are marked as not to be learned (“loss” or “weight”)"
NO_HISTORY = "with a “history” that has neither pairs nor messages"

MOST_MISSING = 0.1  # of the pictures that a table names: more are a mistake in the paths
# Reasons of which `MOST_MISSING` are allowed -> what the pictures are, and what to do.
_UNREAD = {
    MISSING: "are missing: {}. Check the paths",
    AMBIGUOUS: "have the names of several files: {}. Write folders and endings into the names",
    INSIDE: "are inside the file ({}), where they are not read: save them as files",
    ON_WEB: "are on the web ({}), from where they are not fetched: save them as files",
}
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
    "caption_str",
)
# Further columns of captions, beside "caption" or without it.
NUMBERED = re.compile(r"captions?[ _-]?\d+")
# Texts of cells without a value, as programs write them, and of spreadsheets' cells with an error.
_EMPTY_CELLS = {
    *("nan", "NaN", "null", "NULL", "None", "#N/A", "N/A", "<NA>", "#NAME?", "#REF!", "#VALUE!"),
    *("#DIV/0!", "#NULL!", "#NUM!", "#SPILL!", "#CALC!", "#ERROR!"),
}
_STRING = r"'(?:[^'\\]|\\.)*'" + r'|"(?:[^"\\]|\\.)*"'
_GAP = r"[\s,\[\](){}]*"
# A list, tuple or set as Python, JSON or NumPy (without commas) write it into a table's cell.
_LIST = re.compile(
    r"(?:(?:np\.)?array\(|(?:frozen)?set\()?"
    rf"([\[({{]{_GAP}(?:(?:np\.str_\((?:{_STRING})\)|{_STRING}|None|null|nan){_GAP})*)"
    r"(?<=[\])}])(?:,\s*dtype=[^)]*\))?",
    re.DOTALL,
)
# Texts that begin like such a list or an object, and are no captions either.
_VALUE = re.compile(r"""\[[{'"]|\('|\{['"]|\[?(?:np\.)?(?:array|str_)\(""")

Read = TypeVar("Read")


class NotUsable(Exception):
    """A record that is left out; its text is the reason."""


def captions_in(value: object, cells: bool = True) -> list[str]:
    """The captions in a field: a string, or a list of strings, nested to any depth.

    cells: a string may be a list's text, and one such as "None" is an empty cell. Blank strings,
    null and NaN are no captions. ValueError for any other value.
    """
    found, left = [], [value]
    while left:
        item = left.pop()
        if item is None or item != item:
            continue
        if isinstance(item, list | tuple):
            left += reversed(item)
        elif not isinstance(item, str):
            raise ValueError
        elif cells and (listed := _LIST.fullmatch(text := item.strip())):
            left += map(_unquoted, reversed(re.findall(_STRING, listed[1], re.DOTALL)))
        elif cells and _VALUE.match(text) and text.endswith(("]", ")", "}")):
            raise ValueError  # a list with something other than strings, or an object
        elif (text := item.strip()) and not (cells and text in _EMPTY_CELLS):
            found.append(text)
    return found


def _unquoted(text: str) -> str:
    try:
        return ast.literal_eval(text.replace("\r", "\\r").replace("\n", "\\n"))
    except SyntaxError:
        raise ValueError from None


def choose_captions(values: Iterable[object], cells: bool = True) -> tuple[tuple[str, ...], str]:
    """(the captions of the first value that has any, ""), or ((), the reason why none has).

    cells: as for `captions_in`.
    """
    reason = NO_CAPTION
    for value in values:
        try:
            found = captions_in(value, cells)
        except ValueError:
            reason = NOT_TEXT
        else:
            if found:
                return tuple(found), ""
    return (), reason


class Reading:
    """Counts what a reader leaves out of `source`, and reports it to the user at the end."""

    def __init__(self, source: object, searched: str = "") -> None:
        """searched: where pictures were looked for."""
        self._source, self._searched = printable(source), searched
        self._left_out: dict[str, list[str]] = {}

    def leave_out(self, name: str, reason: str) -> None:
        """Count something that is left out. name: its name in messages."""
        self._left_out.setdefault(reason, []).append(name)

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Leave out the record that is read in the block if it is `NotUsable`."""
        try:
            yield
        except NotUsable as error:
            self.leave_out(name, str(error))

    def finish(self, read: Sequence[Read], needs: str) -> list[Read]:
        """Report what was read, and return it.

        needs: what the source must contain. UserError if nothing was read, or if more than
        `MOST_MISSING` of the pictures are missing, inside the file or on the web.
        """
        for reason, what in _UNREAD.items():
            unread = self._left_out.get(reason, [])
            if len(unread) > MOST_MISSING * (len(read) + len(unread)):
                where = f" They were looked for in {self._searched}." if reason == MISSING else ""
                raise UserError(
                    f"{len(unread):,} of {len(read) + len(unread):,} pictures that {self._source} "
                    f"names {what.format(_first(unread))}.{where if self._searched else ''}"
                )
        if not read:
            why = f" ({self.summary()})" if self._left_out else ""
            raise UserError(f"{self._source} contains no pictures with captions{why}: {needs}.")
        noun = "picture" if len(read) == 1 else "pictures"
        left_out = f"; {self.summary()}" if self._left_out else ""
        say(f"{self._source}: {len(read):,} {noun} read{left_out}.")
        return list(read)

    def summary(self) -> str:
        """Such as "12 left out: 7 without a caption (a; b; c; …), 5 of a kind that is not read"."""
        count = sum(map(len, self._left_out.values()))
        reasons = (f"{len(n):,} {why} ({_first(n)})" for why, n in self._left_out.items())
        return f"{count:,} left out: {', '.join(reasons)}"


def _first(names: list[str]) -> str:
    shown = "; ".join(map(shortened, names[:NAMED]))
    return shown + ("; …" if len(names) > NAMED else "")
