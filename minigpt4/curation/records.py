"""The JSON-lines files between the steps: one record, of one picture, per line. No torch."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt4.data.files import lock, parse_jsonl, repair_jsonl, replacing, shortened
from minigpt4.errors import UserError

KEY = "image_id"
DECISIONS = ("keep", "edit", "drop")


def read_records(path: str | Path) -> dict[str, dict]:
    """image_id -> record, in the order of first appearance; the last line of an id counts.

    An incomplete last line is ignored. UserError if the file is missing or not in UTF-8, or if
    another line is not a record.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: name the file that the previous step wrote."
        ) from error
    return _parse(path, content)


def write_records(path: str | Path, records: Iterable[dict]) -> None:
    """Write a whole file: readers see the old one or the new one, never a part."""
    path = Path(path)
    make_folder(path.parent)
    with replacing(path) as partial, partial.open("wb") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Create a folder. UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be created: choose another with “--out”."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """UserError if the disk refuses what is written inside the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, then do it again."
        ) from error


class Records:
    """A file of records that can be appended to.

    Opening it removes a last line that a crash or a full disk left incomplete, so that its picture
    is processed again. If the system can lock files, no second program can open it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        self._file = self.path.open("ab", buffering=0)
        lock(
            self._file,
            f"{self.path} is being written by another program: wait for it, or choose another file "
            "with “--out”.",
        )
        self.records = _parse(self.path, self.path.read_bytes())
        repair_jsonl(self.path)

    def append(self, record: dict) -> None:
        """Write one line; it is on the disk when this returns.

        UserError if there is no room: the file is then unchanged.
        """
        end = os.fstat(self._file.fileno()).st_size
        rest = _line(record)
        with writing(self.path):
            try:
                while rest:  # a full disk may accept a part first
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:  # remove the part, or the next line would be appended to it
                os.ftruncate(self._file.fileno(), end)
                raise
        self.records[record[KEY]] = record

    def close(self) -> None:
        """Release the file, so that other programs can write it."""
        self._file.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"


def _parse(path: Path, content: bytes) -> dict[str, dict]:
    content = content.removeprefix(codecs.BOM_UTF8)  # editors may add it
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # as a crash leaves it
            raise UserError(f"{path} is not in UTF-8: save it as UTF-8.") from error
        text = content[: error.start].decode()
    records: dict[str, dict] = {}
    for number, record in parse_jsonl(path, text, KEY, cut_end=True):
        _check(record, f"line {number} of {path}")
        records[record[KEY]] = record
    return records


def _check(record: dict, place: str) -> None:
    """UserError unless the fields on which decisions depend are what the steps write."""
    if not isinstance(record[KEY], str):
        raise UserError(f"The record of {place} needs a text as “{KEY}”: correct the line.")
    about = f"of “{shortened(record[KEY])}” ({place})"
    if not isinstance(record.get("text"), str | None):
        raise UserError(f"The record {about} needs a text as “text”: correct the line.")
    if "decision" in record and record["decision"] not in DECISIONS:
        raise UserError(f"The “decision” {about} must be “keep”, “edit” or “drop”: correct it.")
    if not isinstance(record.get("kept", True), bool):
        raise UserError(f"“kept” {about} must be true or false, without quotes: correct it.")
