"""Your own captions: a folder of pictures with a CSV or JSON-lines file."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from minigpt4.data import captions
from minigpt4.data.captions import NotUsable, choose_captions
from minigpt4.data.conversations import (
    SYSTEM,
    TURNS,
    check_record,
    history_of,
    pictures_in,
    texts_of,
    turns_of,
    with_system,
    without_marks,
)
from minigpt4.data.examples import Collected, Example, Text, fields_of, picture_name
from minigpt4.data.files import (
    Repeated,
    decode,
    load_json,
    local_path,
    parse_jsonl,
    printable,
    read_text,
    repeated_in,
    repeated_names,
    shortened,
)
from minigpt4.data.names import is_hidden
from minigpt4.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", *JSON_LINES)
TEXTS = (".txt", ".token")  # endings of text files that may be tables
# Names that a column or a field may have; the first one with a value counts.
PICTURE = (
    "file_name",
    "file_names",
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
# Columns that are read besides captions: a second one with the same name would hide the first.
_READ = {*PICTURE, *INSTRUCTION, *SYSTEM, *TURNS, "input", "history"}
_DELIMITERS = (",", ";", "\t", "|")
_MOST_TEXTS = 10  # text files in a folder that may be tables; more are one picture's captions each
# A line of Flickr8k.token.txt, which has no header.
_FLICKR = re.compile(r"\ufeff?[^\t\n]+\.\w+#\d+\t")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{10000}")
_LEMMAS = re.compile(r"(?i).*\.lemma\.token\.txt")  # Flickr8k's captions without inflections
_NEEDS = "write a picture and its caption on each line"

Row = dict[str, object]


def is_table(where: str | Path) -> bool:
    """Whether this is a table, or a folder with one or more of them."""
    path = local_path(where)
    if path.is_dir():
        return bool(tables_in(path))
    return path.suffix.lower() in SUFFIXES or _is_text_table(path)


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder, without hidden files; text files if there is no other."""
    files = [p for p in folder.iterdir() if not is_hidden(p.name)]
    tables = [p for p in files if p.suffix.lower() in SUFFIXES and p.is_file()]
    texts = [p for p in files if p.suffix.lower() in TEXTS and not _LEMMAS.fullmatch(p.name)]
    if not tables and len(texts) <= _MOST_TEXTS:
        tables = [p for p in texts if _is_text_table(p)]
    return sorted(tables)


def _is_text_table(path: Path) -> bool:
    """Whether a text file is a table: Kaggle's captions.txt with its header, Flickr's own lists."""
    if path.suffix.lower() not in TEXTS or not path.is_file():
        return False
    with path.open("rb") as file:
        first, _, second = decode(file.read(1024), "replace").partition("\n")
    names = {name.strip(' "\ufeff\r').casefold() for name in re.split(r"[,;|\t]", first)}
    named = not names.isdisjoint(PICTURE) and _has_captions(names)
    return bool(second) and named or _FLICKR.match(first) is not None


def read_table(where: str | Path) -> list[Example]:
    """The pictures of a table with their captions, in the order of its lines.

    where: the table, or a folder that contains one; pictures are named relative to it. Lines of
    the same picture are combined. A line may have an `instruction` that its caption answers. Lines
    that cannot be used are left out and reported. UserError names a line that is not of the table's
    format.
    """
    path = _find(local_path(where))
    text, folders = read_text(path), picture_folders(path.parent)
    if path.suffix.lower() in JSON_LINES:
        return read_rows(path, _json_rows(path, text), folders)
    return read_rows(path, _csv_rows(path, text), folders, cells=True)


def picture_folders(folder: Path) -> list[list[Path]]:
    """The folders in which the pictures of a table in this folder are looked for, as for
    `PictureFinder`: the folder, its images/ or image/, then its other folders."""
    first = [[folder], [folder / "images"], [folder / "image"]]
    return [*first, [f for f in folders_in(folder) if [f] not in first]]


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name))


def read_rows(
    path: Path, rows: Iterable[tuple[str, Row]], folders: list[list[Path]], cells: bool = False
) -> list[Example]:
    """The pictures that rows name with their captions, or with the answers of conversations.

    rows: (place, name in lower case -> value) each. folders: where the pictures are looked for.
    cells: whether the rows are a spreadsheet's, which has no lists and no null.
    """
    collected = Collected(path, folders, by_path=True)
    for place, row in rows:
        with collected.reading.record(place):
            texts, found = texts_of_row(row, cells)
            name = picture_of(row)
            collected.add(name, texts, found=found, shown=f"{place}: {name}")
    return collected.finish(_NEEDS)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    tables = tables_in(path)
    if len(tables) != 1:
        names = ", ".join(shortened(p.name) for p in tables[:3])
        what = f"{len(tables)} tables ({names}): name one of them"
        raise UserError(
            f"{printable(path)} contains "
            f"{what if tables else 'no table: name the CSV or JSON-lines file itself'}."
        )
    return tables[0]


def json_lines(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """(place, record with lower-case names) of JSON lines."""
    for number, record in parse_jsonl(path, text, repeated=True):
        yield f"line {number}", with_lower_names(record)


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """As `json_lines`; also for one JSON list, since some programs give that the same ending."""
    try:
        whole = load_json(text)
    except (ValueError, RecursionError):
        whole = None  # several lines
    if isinstance(whole, dict) and "\n" in text.strip():
        raise UserError(
            f"{printable(path)} is one JSON object, not JSON lines: name it "
            f"“{printable(path.stem)}.json”, or write each object on one line."
        )
    if not isinstance(whole, list) or not all(isinstance(record, dict) for record in whole):
        return json_lines(path, text)
    return ((f"record {i}", with_lower_names(record)) for i, record in enumerate(whole, 1))


def with_lower_names(record: dict) -> Row:
    """A record whose names are in lower case and stripped; a `Repeated` if it has one in it, or if
    a field that is read is there in two cases."""
    pairs = [(str(name or "").strip().casefold(), value) for name, value in record.items()]
    twice = repeated_in(record) is not None or _read_twice([name for name, _ in pairs])
    return Repeated(pairs) if twice else dict(pairs)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """(place, column in lower case -> cell) of each line of a spreadsheet after its header.

    The delimiter is the one that Excel's line "sep=;" names, or else the header's.
    """
    if _FLICKR.match(text):  # not CSV: quotes belong to the caption
        for number, line in enumerate(text.split("\n"), 1):
            name, _, caption = line.partition("\t")
            if line.strip():
                yield f"line {number}", {PICTURE[0]: name, "caption": caption}
        return
    skipped = 0
    if named := re.match(r'(?i)"?sep=(.)"?[^\S\n]*\n', text):
        text, skipped = text[named.end() :], 1
    header = text.split("\n", 1)[0]
    mark = named[1] if named else max(_DELIMITERS, key=header.count)
    lines = _csv_lines(path, text, mark, skipped)
    columns = [name.strip().casefold() for name in next(lines)[1]]
    _check_columns(path, columns)
    for number, cells in lines:
        if any(cells[len(columns) :]):
            raise UserError(
                f"Line {number} of {printable(path)} has more cells than the first line: put a "
                f"caption that contains a “{mark}” in double quotes."
            )
        if cells:
            yield f"line {number}", dict(zip(columns, cells, strict=False))


def _csv_lines(path: Path, text: str, mark: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each record. skipped: lines before `text`.

    UserError if a quote seems not to be closed: it would swallow the lines after it.
    """
    lines = [*io.StringIO(text), "\n"]  # a quote that is not closed reaches the added line
    reader = csv.reader(lines, delimiter=mark)
    columns = 0
    while (first := reader.line_num) < len(lines):
        try:
            cells = next(reader)
            cells = _cells(lines[first : reader.line_num], mark, cells, columns)
        except csv.Error as error:
            start = f"Line {first + 1 + skipped} of {printable(path)}"
            if "field limit" in str(error):
                what = (
                    "a picture inside the file: save pictures as files"
                    if _BASE64.search(lines[first])
                    else f"a cell of more than {csv.field_size_limit():,} characters: shorten it, "
                    "or check its quotes"
                )
                raise UserError(f"{start} has {what}.") from error
            raise UserError(f"{start} is not CSV: check its quotes.") from error
        columns = columns or len(cells)
        yield first + 1 + skipped, cells


def _cells(record: list[str], mark: str, lenient: list[str], columns: int) -> list[str]:
    """The cells of a record's lines. csv.Error for several lines that are not strictly CSV.

    Blanks before an opening quote and after a closing one do not count. A text such as “"Stop"
    sign” has its own quotes if the line then has a cell for each column; otherwise the `lenient`
    cells remain.
    """
    blanks = " " if mark == "\t" else " \t"
    closing = re.compile(rf'"[{blanks}]+(?={re.escape(mark)}|$)')
    for lines in (record, (closing.sub('"', line) for line in record)):
        with suppress(csv.Error):
            return next(csv.reader(lines, delimiter=mark, strict=True, skipinitialspace=True))
    if len(record) > 1:
        raise csv.Error
    plain = next(csv.reader(record, delimiter=mark, quoting=csv.QUOTE_NONE))
    return plain if len(plain) == columns else lenient


def _check_columns(path: Path, columns: list[str]) -> None:
    if not {*PICTURE} & {*columns} or not _has_captions(columns):
        raise UserError(
            f"The first line of {printable(path)} must name the columns: “{PICTURE[0]}” and "
            "“caption”."
        )
    if twice := _read_twice(columns):
        raise UserError(
            f"The first line of {printable(path)} names the column “{twice[0]}” more than once: "
            "rename or remove one."
        )


def _read_twice(names: list[str]) -> list[str]:
    """The names that are read, but come more than once."""
    if len({*names}) == len(names):
        return []
    return [n for n in repeated_names(names) if n in _READ or captions.is_field(n)]


def _has_captions(columns: Iterable[str]) -> bool:
    return any(map(captions.is_field, columns))


def names_picture(row: Row) -> bool:
    """Whether a row names one picture or several."""
    return _named(row) is not None or bool(pictures_in(row))


def _named(row: Row) -> object:
    """The first picture field with a value; None if there is none."""
    return next((row[name] for name in PICTURE if row.get(name) not in (None, "", [])), None)


def picture_of(row: Row) -> str:
    """The one picture that a row names. NotUsable if it names none, or several."""
    named = _named(row)
    if isinstance(named, dict) and all(name.startswith("<") for name in named):
        named = [*named.values()]  # MiniCPM's pictures, by their marks
    found = named if isinstance(named, list) else [named]
    if any(isinstance(p, dict) and p.get("bytes") and not p.get("path") for p in found):
        raise NotUsable(captions.INSIDE)
    found = [p.get("path") or p.get("url") if isinstance(p, dict) else p for p in found]
    found = [p for p in found if p is not None] or pictures_in(row)
    if len(found) > 1:
        raise NotUsable(captions.SEVERAL_PICTURES)
    other = any(row.get(name) for name in ("video", "audio", "sound"))
    reason = captions.VIDEO if other else captions.NO_PICTURE
    return picture_name(found[0] if found else None, reason)


def texts_of_row(row: Row, cells: bool = False) -> tuple[tuple[Text, ...], tuple[str, ...]]:
    """(the texts of a row, the captions among them). NotUsable if there are none.

    cells: as for `read_rows`. If false, "None" is an answer, not an empty cell.
    """
    check_record(row)
    if (turns := turns_of(row)) is not None:
        return texts_of(row, turns), ()
    asks = row.get("question_id") is not None and "answer_id" not in row
    if asks and not any(row.get(name) for name in INSTRUCTION):
        row = {**row, "question": row.get("text"), "text": None}  # as in LLaVA's files of questions
    questions, _ = choose_captions((row.get(name) for name in INSTRUCTION), cells)
    more, _ = choose_captions([row.get("input")], cells)
    found, reason = choose_captions(fields_of(row), cells or not questions)
    if not found:
        raise NotUsable(captions.ANSWERS if row.get("answers") else reason)
    question = "\n".join([*questions, *more]) if questions else ""
    exchanges = [*history_of(row), (question, "\n".join(found))]
    *earlier, (question, _) = without_marks(with_system(row, exchanges) if question else exchanges)
    asked = (question,) if question else ()
    return tuple(Text(caption, asked, tuple(earlier)) for caption in found), found
