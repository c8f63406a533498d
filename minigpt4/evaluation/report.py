"""Reports: Markdown tables, and figures with their date, machine and command. No torch."""

import argparse
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from minigpt4.data.files import naming, read_text
from minigpt4.data.outputs import write_json
from minigpt4.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Cells are escaped; line breaks in them are kept."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines)


def cell(value: object) -> str:
    """A table cell: floats with three digits, text escaped so that it does not break the table."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return re.sub(r"\s*\n\s*", "<br>", text.strip())


def pictures(count: int) -> str:
    """1 -> "1 picture", 2 -> "2 pictures"."""
    return f"{count} picture{'s' if count != 1 else ''}"


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


def with_interval(share: str | None, interval: Sequence[float]) -> str:
    """A share with its interval: "12.3 %", (0.081, 0.19) -> "12.3 % (8–19)"."""
    low, high = interval
    return f"{share} ({100 * low:.0f}–{100 * high:.0f})"


def beginning(text: str, characters: int = 400) -> str:
    """The beginning of a long text."""
    return text if len(text) <= characters else text[:characters].rstrip() + " […]"


def machine() -> str:
    """Processor, available cores, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores, {_gpu()}"


def processor() -> str:
    """The name of the processor's model."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> str:
    if "torch" in sys.modules and find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return "no GPU"


def circumstances(model: str, seconds: float, program: str = "minigpt4") -> dict[str, object]:
    """The date, machine and command of a measurement, and its seconds.

    program: the module after `python -m`.
    """
    return {
        "model": model,
        "date": date.today().isoformat(),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
    }


def caption(result: dict) -> str:
    """The line under a table; without the time if stored answers were used."""
    took = f", {result['seconds']:.0f} s" if result["seconds"] >= 0.5 else ""
    return (
        f"{result['model']}, {result['date']}, {result['machine']}{took}:\n\n"
        f"```sh\n{result['command']}\n```"
    )


def publish(
    name: str,
    result: dict,
    text: str,
    seconds: float,
    options: argparse.Namespace,
    program: str = "minigpt4",
) -> None:
    """Print an experiment's report and write it to `options.json` and `options.markdown`."""
    result |= circumstances(result["model"], seconds, program)
    print(text)
    write_json(options.json, {"experiment": name} | result)
    write_markdown(options.markdown, name, f"{text}\n\n{caption(result)}")


def find_place(path: str | os.PathLike, name: str) -> tuple[str, str]:
    """The text of a page before and after the place of a report, which is between the lines
    `<!-- NAME -->` and `<!-- /NAME -->`; ("", "") for a page that is empty or does not exist.

    UserError if the page has text but no such place: the text would be lost.
    """
    begin, end = _marks(name)
    old = read_text(path) if Path(path).exists() else ""
    before, _, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if old.strip() and not closed:
        raise UserError(
            f"{path} has text but no place for the tables: add the lines “{begin.strip()}” and "
            f"“{end}”, or name a new file."
        )
    return (before, after) if closed else ("", "")


def write_markdown(path: str | None, name: str, text: str) -> None:
    """Write a report to its place in a page (`find_place`), or to a new page.

    A page of the docs is updated by the command it shows.
    """
    if path:
        before, after = find_place(path, name)
        begin, end = _marks(name)
        page = f"{before}{begin}{text.strip()}\n{end}{after}"
        with naming(path):
            Path(path).write_text(page.rstrip() + "\n", encoding="utf-8", errors="replace")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"
