"""Results written to files, which must not overwrite what they were computed from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from minigpt4.data.files import naming
from minigpt4.data.shards import expand
from minigpt4.errors import UserError
from minigpt4.model.image import has_picture_name

_PAGES = (".md", ".html")  # not data: a report is written into a page that has text already


def print_json(result: dict, path: str | None) -> None:
    """Print figures as JSON, and write them if a path is given."""
    print(json.dumps(result, indent=1, ensure_ascii=False))
    write_json(path, result)


def write_json(path: str | None, result: dict) -> None:
    """Write figures as JSON, if a path is given."""
    if path:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        _write(path, text + "\n")


def write_lines(path: str | None, records: Sequence[dict]) -> None:
    """Write JSON lines, if a path is given."""
    if path:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        _write(path, "".join(lines))


def _write(path: str, text: str) -> None:
    with naming(path):
        Path(path).write_text(text, encoding="utf-8", errors="replace")


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | None]) -> None:
    """UserError if an output is a folder, or would overwrite an input or another output.

    outputs: option -> its file. inputs: files, patterns of files, and folders, which stand for all
    their files except pages.
    """
    taken = set()
    for given in filter(None, inputs):
        place = Path(given).expanduser()
        with suppress(UserError):  # reading it reports that it is missing
            taken |= {file.resolve() for file in ([place] if place.exists() else expand(given))}
    for option, path in outputs.items():
        if path and Path(path).is_dir():
            raise UserError(f"“--{option} {path}” is a folder: name a file in it.")
        if path and (Path(path).is_file() or not Path(path).exists()):  # not a device or a pipe
            file = Path(path).resolve()
            # An empty file may be overwritten: a command that ended early leaves one.
            filled = file.suffix not in _PAGES and file.exists() and file.stat().st_size
            among = has_picture_name(file.name) or not taken.isdisjoint(file.parents)
            if file in taken or (filled and among):
                raise UserError(
                    f"“--{option}” would overwrite {path}, which is read or written already, or "
                    "lies among the data: name another file."
                )
            taken.add(file)
