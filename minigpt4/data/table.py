"""Your own captions: a folder of pictures with a CSV or JSON-lines file."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from minigpt4.data import captions
from minigpt4.data.captions import choose_captions
from minigpt4.data.conversations import (
    NotUsable,
    history_of,
    is_conversation,
    pictures_in,
    texts_of,
    without_placeholders,
)
from minigpt4.data.examples import Collected, Example, Text, fields_of, picture_name
from minigpt4.data.files import parse_jsonl, read_text
from minigpt4.data.names import is_hidden
from minigpt4.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl")
# Names that a column or a field may have; the first one with a value counts.
PICTURE = (
    "file_name",
    "filename",
    "file",
    "image",
    "images",
    "picture",
    "photo",
    "path",
    "image_path",
    "image_name",
    "filepath",
    "image_id",
)
INSTRUCTION = ("instruction", "question", "prompt", "query")
_DELIMITERS = (",", ";", "\t", "|")
_NEEDS = "write a picture and its caption on each line"

Row = dict[str, object]


def is_table(where: str | Path) -> bool:
    """Whether this is a table, or a folder with one or more of them."""
    path = Path(where).expanduser()
    return bool(tables_in(path)) if path.is_dir() else path.suffix.lower() in SUFFIXES


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder, without hidden files."""
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in files if not is_hidden(p.name))


def read_table(where: str | Path, instructions: tuple[str, ...] = ()) -> list[Example]:
    """The pictures of a table with their captions, in the order of its lines.

    where: the table, or a folder that contains one; pictures are named relative to it. Lines of
    the same picture are combined. A line may have an `instruction` that its caption answers;
    `instructions` are for lines without one. Lines that cannot be used are left out and reported.
    UserError names a line that is not of the table's format.
    """
    path = _find(Path(where).expanduser())
    numbered = ((f"line {number}", row) for number, row in _rows(path))
    return read_rows(path, numbered, instructions, picture_folders(path.parent))


def picture_folders(folder: Path) -> list[Path]:
    """Where the pictures of a table in this folder are looked for."""
    return [folder, folder / "images", folder / "image"]


def read_rows(
    path: Path,
    rows: Iterable[tuple[str, Row]],
    instructions: tuple[str, ...],
    folders: list[Path],
) -> list[Example]:
    """The pictures that rows name with their captions, or with the answers of conversations.

    rows: (place, name in lower case -> value) each. folders: where the pictures are looked for.
    """
    collected = Collected(path, folders, by_path=True)
    for place, row in rows:
        try:
            name = _picture(row)
            texts, found = texts_of_row(row, instructions)
        except NotUsable as error:
            collected.reading.leave_out(place, str(error))
        else:
            collected.add(name, texts, found=found, shown=f"{name}, {place}")
    return collected.finish(_NEEDS)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    tables = tables_in(path)
    if len(tables) != 1:
        what = "no table" if not tables else f"{len(tables)} tables"
        names = f" ({', '.join(p.name for p in tables[:3])})" if tables else ""
        raise UserError(f"{path} contains {what}{names}: name the CSV or JSON-lines file itself.")
    return tables[0]


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, column -> value) of a table's lines; column names in lower case."""
    text = read_text(path)
    rows = parse_jsonl(path, text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text)
    for number, row in rows:
        yield number, with_lower_names(row)


def with_lower_names(record: dict) -> Row:
    """A record whose names are in lower case and stripped."""
    return {str(name or "").strip().casefold(): value for name, value in record.items()}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """The delimiter is the one that Excel's line "sep=;" names, or the header's."""
    skipped = 0
    if named := re.match(r'(?i)"?sep=(.)"?[^\S\n]*\n', text):
        text, skipped = text[named.end() :], 1
    header = text.split("\n", 1)[0]
    mark = named[1] if named else max(_DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    names = {str(name or "").strip().casefold() for name in reader.fieldnames or ()}
    if not names & set(PICTURE) or not names & set(captions.FIELDS):
        raise UserError(
            f"The first line of {path} must name the columns: “{PICTURE[0]}” and “caption”."
        )
    try:
        for row in reader:
            number = reader.line_num + skipped
            if any(row.pop(None, ())):
                raise UserError(
                    f"Line {number} of {path} has more cells than the first line: put a "
                    f"caption that contains a “{mark}” in double quotes."
                )
            yield number, row
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(f"Line {line} of {path} is not CSV: check its quotes.") from error


def _picture(row: Row) -> str:
    """The one picture that a row names. NotUsable if it names none, or several."""
    named = next((row[name] for name in PICTURE if row.get(name) not in (None, "", [])), None)
    found = named if isinstance(named, list) else [named]
    found = [p.get("path") or p.get("url") if isinstance(p, dict) else p for p in found]
    found = [p for p in found if p is not None] or pictures_in(row)
    if len(found) > 1:
        raise NotUsable(captions.SEVERAL_PICTURES)
    try:
        return picture_name(found[0])
    except (IndexError, ValueError):
        raise NotUsable(captions.NO_PICTURE) from None


def texts_of_row(
    row: Row, instructions: tuple[str, ...]
) -> tuple[tuple[Text, ...], tuple[str, ...]]:
    """(the texts of a row, the captions among them). NotUsable if there are none."""
    if is_conversation(row):
        return texts_of(row), ()
    found, reason = choose_captions(fields_of(row))
    if not found:
        raise NotUsable(reason)
    questions, _ = choose_captions(row.get(name) for name in INSTRUCTION)
    more, _ = choose_captions([row.get("input")])
    asked = (without_placeholders("\n".join([*questions, *more])),) if questions else instructions
    return tuple(Text(caption, asked, history_of(row)) for caption in found), found
