"""Your own captions: a folder of pictures with a CSV or JSON-lines file."""

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minigpt4.data.examples import Example, Text, read_shards
from minigpt4.data.files import parse_jsonl, read_text, version_of
from minigpt4.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl")
# Names that a column or a field may have; the first one found counts.
PICTURE = ("file_name", "filename", "file", "image", "picture", "photo", "path", "image_id")
CAPTION = ("caption", "captions", "text", "texts", "description", "answer")
INSTRUCTION = ("instruction", "question", "prompt")


def is_table(where: str | Path) -> bool:
    """Whether this is a table, or a folder with one or more of them."""
    path = Path(where).expanduser()
    if path.is_dir():
        return any(p.suffix.lower() in SUFFIXES for p in path.iterdir())
    return path.suffix.lower() in SUFFIXES


def read_table(where: str | Path, instructions: tuple[str, ...] = ()) -> list[Example]:
    """The pictures of a table with their captions, in the order of its lines.

    where: the table, or a folder that contains one; pictures are named relative to it. Lines of
    the same picture are combined. A line may have an `instruction` that its caption answers;
    `instructions` are for lines without one. UserError names the line that is wrong.
    """
    path = _find(Path(where).expanduser())
    examples: dict[Path, Example] = {}
    for number, row in _rows(path):
        picture = _picture(path, number, row)
        asked = _first(row, INSTRUCTION)
        asked = (asked.strip(),) if isinstance(asked, str) and asked.strip() else instructions
        captions = _captions(path, number, row)
        texts = tuple(Text(caption, asked) for caption in captions)
        if picture in examples:
            old = examples[picture]
            texts, captions = old.texts + texts, old.captions + captions
            examples[picture] = replace(old, texts=texts, captions=captions)
        else:
            examples[picture] = _example(path, picture, texts, captions)
    if not examples:
        raise UserError(f"{path} has no lines: write a picture and its caption on each.")
    return list(examples.values())


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    tables = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if len(tables) != 1:
        what = "no table" if not tables else f"{len(tables)} tables"
        raise UserError(f"{path} contains {what}: name the CSV or JSON-lines file itself.")
    return tables[0]


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, column -> value) of a table's lines; column names in lower case."""
    text = read_text(path)
    rows = parse_jsonl(path, text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text)
    for number, row in rows:
        yield number, {str(name or "").strip().casefold(): value for name, value in row.items()}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """The delimiter is the one of the header: a comma, a semicolon or a tab."""
    header = text.split("\n", 1)[0]
    mark = max((",", ";", "\t"), key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    names = {str(name or "").strip().casefold() for name in reader.fieldnames or ()}
    if not names & set(PICTURE) or not names & set(CAPTION):
        raise UserError(
            f"The first line of {path} must name the columns: “{PICTURE[0]}” and “{CAPTION[0]}”."
        )
    try:
        for row in reader:
            if any(row.pop(None, ())):
                raise UserError(
                    f"Line {reader.line_num} of {path} has more cells than the first line: put a "
                    f"caption that contains a “{mark}” in double quotes."
                )
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"Line {line} of {path} is not CSV: check its quotes.") from error


def _first(row: dict, names: tuple[str, ...]) -> object:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _picture(path: Path, number: int, row: dict) -> Path:
    """The picture file of a line: as it is named, or with one of the usual endings."""
    named = _first(row, PICTURE)
    if not isinstance(named, str | int) or not str(named).strip():
        raise UserError(f"Line {number} of {path} names no picture (“{PICTURE[0]}”).")
    file = path.parent / str(named).strip()
    for candidate in (file, *(file.with_name(file.name + s) for s in (".jpg", ".jpeg", ".png"))):
        if candidate.is_file():
            return candidate
    raise UserError(f"Line {number} of {path} names {named}, which is missing: check its path.")


def _captions(path: Path, number: int, row: dict) -> tuple[str, ...]:
    found = _first(row, CAPTION)
    found = [found] if isinstance(found, str) else found
    texts = [c.strip() for c in found if isinstance(c, str)] if isinstance(found, list) else []
    if not any(texts):
        raise UserError(f"Line {number} of {path} has no caption (“{CAPTION[0]}”).")
    return tuple(text for text in texts if text)


def _example(path: Path, picture: Path, texts: tuple[Text, ...], captions: tuple) -> Example:
    key = picture.relative_to(path.parent).as_posix() if picture.is_relative_to(path.parent) else ""
    return Example(key or str(picture), picture.read_bytes, texts, captions, version_of(picture))


def read_captioned(where: str, instructions: tuple[str, ...] = ()) -> list[Example]:
    """Captioned pictures from shards, or from a folder with a table."""
    if is_table(where):
        return read_table(where, instructions)
    if Path(where).expanduser().is_dir():
        raise UserError(
            f"{where} contains no table of captions: put a CSV or JSON-lines file beside the "
            "pictures, or name shards (DIR/*.tar)."
        )
    return read_shards(where, instructions)
