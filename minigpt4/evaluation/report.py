"""Tables in Markdown, and what a figure must stand with: date, machine, command. No torch."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from minigpt4.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are escaped, line breaks in them kept."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines)


def cell(value: object) -> str:
    """A table's cell: floats with three digits, texts so that they break no table."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return re.sub(r"\s*\n\s*", "<br>", text.strip())


def percent(share: float | None) -> str | None:
    """0.123 -> "12.3 %"."""
    return None if share is None else f"{100 * share:.1f} %"


def interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    z = 1.96
    share, weight = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / weight
    half = z / weight * (share * (1 - share) / total + z * z / (4 * total**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(share: str, interval: Sequence[float]) -> str:
    """A share with the ends of its interval: "12.3 %", (0.081, 0.19) -> "12.3 % (8–19)"."""
    low, high = interval
    return f"{share} ({100 * low:.0f}–{100 * high:.0f})"


def shortened(text: str, characters: int = 400) -> str:
    """The beginning of a long text."""
    return text if len(text) <= characters else text[:characters].rstrip() + " […]"


def machine() -> str:
    """Processor, cores that may be used, and GPU."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(errors="replace"))
        name = found[1].strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {_gpu()}"


def _gpu() -> str:
    if "torch" in sys.modules and find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return "no GPU"


def circumstances(model: str, seconds: float) -> dict[str, object]:
    """When, where and how figures were made; `seconds` of it."""
    return {
        "model": model,
        "date": date.today().isoformat(),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "command": shlex.join(["python", "-m", "minigpt4", *sys.argv[1:]]),
    }


def caption(result: dict) -> str:
    """The line under a table."""
    return (
        f"{result['model']}, {result['date']}, {result['machine']}, "
        f"{result['seconds']:.0f} s:\n\n```sh\n{result['command']}\n```"
    )


def write_json(path: str | None, result: dict) -> None:
    """The figures, for programs."""
    if path:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def write_lines(path: str | None, records: Sequence[dict]) -> None:
    """JSON lines."""
    if path:
        lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        Path(path).write_text("".join(lines), encoding="utf-8")


def read_text(path: str | os.PathLike) -> str:
    """A text file that people write; UserError where it is not in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8: save it as UTF-8.") from error


def read_lines(path: str | os.PathLike, *needed: str) -> list[dict]:
    """The objects of a JSON-lines file; UserError where one lacks a field of `needed`."""
    records = []
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand in answers
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is no JSON: mend or delete it.") from error
        missing = [n for n in needed if not isinstance(record, dict) or n not in record]
        if missing:
            raise UserError(f"{path}, line {number}, must be an object with “{missing[0]}”.")
        records.append(record)
    return records


def find_place(path: str | os.PathLike, name: str) -> tuple[str, str]:
    """What a page has before and after the place of this report: what stands between the lines
    `<!-- NAME -->` and `<!-- /NAME -->`; ("", "") of a page that is empty or not there yet.

    UserError where the page has other text and no such place, for it would be lost.
    """
    begin, end = _marks(name)
    old = read_text(path) if Path(path).exists() else ""
    before, _, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if old.strip() and not closed:
        raise UserError(
            f"{path} has text and no place for the tables: give it the lines “{begin.strip()}” and "
            f"“{end}”, or name a new file."
        )
    return (before, after) if closed else ("", "")


def write_markdown(path: str | None, name: str, text: str) -> None:
    """Put the report into its place in the page (`find_place`), or into a new page that has one:
    so a page of the docs is brought up to date by the command it shows."""
    if path:
        before, after = find_place(path, name)
        begin, end = _marks(name)
        page = f"{before}{begin}{text.strip()}\n{end}{after}"
        Path(path).write_text(page.rstrip() + "\n", encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"
