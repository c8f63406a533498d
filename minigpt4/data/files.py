"""Text files that people write (UTF-8, JSON lines, `prompts/`); files replaced in one step."""

import codecs
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from minigpt4 import _data
from minigpt4.errors import UserError

if sys.platform != "win32":  # there two runs may write the same file
    import fcntl

PROMPTS = _data.folder("prompts")
_BLOCK = 4096  # bytes
SHOWN = 80  # characters of a name that a message shows

_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(r"(?i)\s*<(!doctype\s+html|html)\b")
_ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|pipe:")
# The messages of torch.save (without a reason) and safetensors if the disk refuses a file.
_REFUSED = re.compile(r"inline_container\.cc|\(os error (\d+)\)")
# Control characters, and those that change the direction of the text after them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_ENCODINGS = (  # the longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def printable(name: object) -> str:
    """A name as text for one line on a terminal: control characters are escaped, and bytes that are
    not UTF-8 become question marks."""
    text = str(name).encode("utf-8", "replace").decode("utf-8")
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(name: object) -> str:
    """`printable`, without the middle of a name of more than `SHOWN` characters."""
    text = printable(name)
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]}…{text[1 - half :]}"


def local_path(where: str | os.PathLike) -> Path:
    """The path that a user names; "~" is a home folder. UserError if it cannot be a path."""
    if not str(where).strip():
        raise UserError("A path is empty: check the variable or the line that it comes from.")
    if _ADDRESS.match(str(where)):
        raise UserError(
            f"{shortened(where)} is an address: save the data as files, then name them."
        )
    try:
        path = Path(where).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "no home folder of this name"
        raise UserError(f"{shortened(where)} cannot be read ({why}): check the path.") from error
    return path


def decode(content: bytes, errors: str = "strict") -> str:
    """UTF-8 text, or another Unicode encoding that its byte-order mark names; without the mark.

    UnicodeDecodeError if it is neither, unless `errors` is another way to treat that.
    """
    encoding = next((e for mark, e in _ENCODINGS if content.startswith(mark)), "utf-8")
    return content.decode(encoding, errors).lstrip("\ufeff")


def read_bytes(path: str | os.PathLike, size: int = -1) -> bytes:
    """The content of a file, or its first bytes. UserError if it cannot be read, or if Git left a
    pointer in its place."""
    try:
        with open(path, "rb") as file:
            content = file.read(size)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a possible name"
        what = "change its permissions" if isinstance(error, PermissionError) else "check the path"
        raise UserError(f"{printable(path)} cannot be read ({why}): {what}.") from error
    if content.startswith(_POINTER):
        raise UserError(
            f"{printable(path)} is a Git LFS pointer, not the file itself: run “git lfs pull”."
        )
    return content


def check_pointer(path: str | os.PathLike) -> None:
    """As `read_bytes`, for a file that something else reads."""
    read_bytes(path, len(_POINTER))


def read_text(path: str | os.PathLike) -> str:
    """A text file, without its byte-order mark. UserError if it cannot be read as `decode` does."""
    try:
        text = decode(read_bytes(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} is not in UTF-8: save it as UTF-8.") from error
    if _WEB_PAGE.match(text):
        raise UserError(
            f"{printable(path)} is a web page, not the file itself: download the file again."
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\n\ufeff", "\n")  # marks inside, from files that were joined


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. UserError if it is not one."""
    return parse_json(path, read_text(path))


def parse_json(path: str | os.PathLike, text: str) -> Any:
    """The content of a JSON file's text. UserError names `path` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(path)} is not JSON: correct it{_column(error, ' at line {0.lineno},')}, "
            "or check that the file is complete."
        ) from error


def _column(error: Exception, line: str = " at") -> str:
    """The place at which JSON is wrong; "" if the error does not say."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    return f"{line.format(error)} column {error.colno}"


def replace_surrogates(data: Any) -> Any:
    """Plain data with "?" for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    return json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))


def is_jsonl(text: str) -> bool:
    """Whether the first of several lines is a JSON object by itself."""
    first, _, more = text.strip().partition("\n")
    try:
        return bool(more) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_jsonl(path: str | os.PathLike, *required: str) -> list[dict]:
    """The objects of a JSON-lines file. UserError if one of them lacks a `required` field."""
    return [record for _, record in parse_jsonl(path, read_text(path), *required)]


def parse_jsonl(
    path: str | os.PathLike, text: str, *required: str, cut_end: bool = False
) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line of `text` that is not blank.

    Only "\\n" ends a line: other line separators may occur inside strings. cut_end: skip a last
    line that is incomplete, as a crash leaves it. UserError names `path` and the line that is not
    an object with all `required` fields.
    """
    lines, shown = text.split("\n"), printable(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if cut_end and number == len(lines):
                return
            raise UserError(
                f"Line {number} of {shown} is not JSON by itself: correct it{_column(error)}, or "
                "delete it."
            ) from error
        missing = [n for n in required if not isinstance(record, dict) or n not in record]
        if missing or not isinstance(record, dict):
            having = f" with “{missing[0]}”" if missing else ""
            raise UserError(f"Line {number} of {shown} must be a JSON object{having}.")
        yield number, record


def repair_jsonl(path: str | os.PathLike) -> bytes:
    """The content of a file that lines are appended to, each ending in a newline.

    A last line that a crash left incomplete is removed from the file.
    """
    content = Path(path).read_bytes()
    whole, newline, last = content.rpartition(b"\n")
    if not last.strip():
        return content
    try:
        json.loads(last)
    except ValueError:
        os.truncate(path, len(whole) + len(newline))
        return whole + newline
    with open(path, "ab") as file:
        file.write(b"\n")  # edited by hand, without a newline at the end
    return content + b"\n"


@contextmanager
def naming(path: str | os.PathLike | None) -> Iterator[None]:
    """Adds the file's name to an OSError in the block: failed writes do not name the file."""
    try:
        yield
    except OSError as error:
        if path and error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Write a file completely or not at all: yields the path to write to, which replaces `path` at
    the end of the block. After an error it is deleted, and `path` is unchanged.

    shared: other processes may write the same file at the same time. OSError if the disk refuses
    the file, whichever library writes it.
    """
    mark = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{mark}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        with naming(path):
            yield partial
        # Some libraries let only the owner read the file, and some disks have no modes.
        with suppress(OSError):
            partial.chmod(partial.stat().st_mode | mode)
        partial.replace(path)
    except Exception as error:
        refused = None if isinstance(error, (OSError, UserError)) else _REFUSED.search(str(error))
        if not refused:
            raise
        reason = int(refused[1] or errno.ENOSPC)
        raise OSError(reason, os.strerror(reason), str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def lock(file: IO, refusal: str) -> None:
    """Lock an open file until it is closed. UserError with this sentence if another run has it.

    Nothing is checked on disks that cannot lock, and on Windows.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(refusal) from error
        except OSError:  # a disk that cannot lock
            pass


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The names and values in a TOML or YAML file. UserError if it is not one, or nested."""
    text = read_text(path)
    try:
        if str(path).lower().endswith(".toml"):
            import tomllib

            found = tomllib.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text) or {}
    except Exception as error:  # from either library
        raise UserError(
            f"{printable(path)} is not TOML or YAML: check it near {_place_of(error)}."
        ) from error
    if not isinstance(found, dict) or any(isinstance(v, dict) for v in found.values()):
        raise UserError(f"{printable(path)} must have a line “name: value” for each value.")
    return found


def _place_of(error: Exception) -> str:
    if mark := getattr(error, "problem_mark", None):
        return f"line {mark.line + 1}"
    said = str(error).strip().split("\n")[-1].rstrip(".")
    if found := re.search(r"at (line \d+)", said):
        return found[1]
    return "its end" if "at end of document" in said else said


def write_settings(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """A YAML file that `read_settings` reads."""
    import yaml

    text = yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def version_of(path: Path) -> str:
    """A string that changes whenever the file changes: its size and modification time."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def sample_of(path: Path, blocks: int = 3) -> str:
    """The size of a file, and a hash of some blocks of it: the first, the last, and others at equal
    distances between them. "" if it cannot be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            last = max(0, size - _BLOCK)
            for start in sorted({last * i // (blocks - 1) for i in range(blocks)}):
                file.seek(start)
                found.update(file.read(_BLOCK))
    except OSError:
        return ""
    return f"{size} {found.hexdigest()[:16]}"


def prompt_lines(name: str) -> tuple[str, ...]:
    """The lines of a file in `prompts/`, without blank lines and comments (#).

    UserError if there are none.
    """
    lines = [line.strip() for line in read_text(PROMPTS / name).splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise UserError(f"prompts/{name} is empty: write at least one line.")
    return found


def prompt_text(name: str) -> str:
    """The lines of a file in `prompts/`, joined by spaces."""
    return " ".join(prompt_lines(name))
