"""The JSON-lines files between the steps: a record a line, a picture a record. No torch."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt4.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two programs on one file are not kept apart there
    fcntl = None

KEY = "image_id"


def read_records(path: str | Path) -> dict[str, dict]:
    """image_id -> record, in the order of first appearance; an id's last line counts.

    A last line that was cut off is passed over. UserError for a file that is not there, and for
    any other line that is no record.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: give the file of the step before.") from error
    return _parse(path, content)


def write_records(path: str | Path, records: Iterable[dict]) -> None:
    """Write the whole file at once: it is the old one or the new one, never a part."""
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def make_folder(folder: Path) -> None:
    """Create a folder for what is written; UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made a folder: give another by “--out”.") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file: UserError where the disk refuses it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, then do it again."
        ) from error


class Records:
    """A file that is appended to: what it holds already, and `append`.

    Opening it repairs it: a last line that a crash or a full disk cut off is taken away, so that
    its picture is done again. Where the system can lock files, a second program that opens the
    same one is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        self._file = self.path.open("ab", buffering=0)
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{self.path} is being written by another program: wait for it, or give "
                    "another file by “--out”."
                ) from error
        self.records = _parse(self.path, self._repaired())

    def append(self, record: dict) -> None:
        """Write one line; it is on the disk when this returns. UserError where there is no room:
        then the file is as it was."""
        end = os.fstat(self._file.fileno()).st_size
        left = _line(record)
        with writing(self.path):
            try:
                while left:  # the disk may take a part, and only then say that it is full
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:  # its part must go, or the next line would be glued to it
                os.ftruncate(self._file.fileno(), end)
                raise
        self.records[record[KEY]] = record

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repaired(self) -> bytes:
        content = self.path.read_bytes()
        whole, newline, last = content.rpartition(b"\n")
        if not last.strip():
            return content
        try:
            json.loads(last)
        except ValueError:
            os.truncate(self.path, len(whole) + len(newline))
            return whole + newline
        self._file.write(b"\n")  # written by hand, without the last line's end
        return content + b"\n"


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"


def _parse(path: Path, content: bytes) -> dict[str, dict]:
    records: dict[str, dict] = {}
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # editors may put a mark in front
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[record[KEY]] = record
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break  # cut off
            raise UserError(
                f"Line {number} of {path} is no record: it must be a JSON object with “{KEY}”; "
                "mend it or take it out."
            ) from error
    return records
