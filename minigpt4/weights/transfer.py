"""One file over the network: going on where a broken line left off, its size and hash checked."""

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from minigpt4.errors import Report, UserError

TRIES = 4  # in a row that bring nothing
WAIT_SECONDS = 1.0  # before the second try; each further one waits twice as long
LINE_SECONDS = 30.0  # between lines in a log, where there is no terminal to show a bar
PASSING_SECONDS = 0.5

constants.DOWNLOAD_CHUNK_SIZE = 2**20  # what a break loses, and a step of the bar; 10 MB otherwise
logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)  # breaks are expected


class Progress:
    """Bytes fetched of all that are to be: a bar in a terminal, lines in a log and on the page."""

    def __init__(self, what: str, total: int, report: Report) -> None:
        self._what, self._report = what, report
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)
        self.total, self.done = total, 0
        self._passing = self._line = time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more; fewer, where some have to be fetched again."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._line > LINE_SECONDS:
            self._line = self._passing = now
            self._report(str(self))
        elif now - self._passing > PASSING_SECONDS:
            self._passing = now
            self._report(str(self), passing=True)

    def grow(self, count: int) -> None:
        """So many bytes more are to come than was thought."""
        self.total = self._bar.total = self.total + count
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def __str__(self) -> str:
        share = f", {100 * self.done // self.total} %" if self.total else ""
        return f"Fetching {self._what}: {in_words(self.done)} of {in_words(self.total)}{share}"


def in_words(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@dataclass(frozen=True)
class Remote:
    """A file at an address: its size in bytes (0: unknown) and what its server says to be its hash.

    name: its path among the files that are fetched with it.
    """

    url: str
    name: str
    size: int
    etag: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def ask(url: str, name: str, headers: dict[str, str]) -> Remote:
    """Size and hash of what lies at an address. Raises what the server or the line answers."""
    try:
        found = get_hf_file_metadata(url, headers=headers, token=False)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        time.sleep(WAIT_SECONDS)  # a short disturbance, perhaps
        found = get_hf_file_metadata(url, headers=headers, token=False)
    return Remote(url, name, found.size or 0, found.etag or "", headers)


def fetch(remote: Remote, target: Path, progress: Progress, sha256: str = "") -> None:
    """Fetch the file, its hash checked against `sha256` or the server's. A part that an earlier
    try left is gone on from. UserError where it is damaged, or the disk full; else what the server
    or the line answers."""
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
                f"{remote.name} came damaged from {remote.url} twice (its hash is another): try "
                "again later, or take it from elsewhere."
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
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(f"The disk is full: {part.parent} needs more room.") from error
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if status == 416 or _size(part) > remote.size > 0:  # there is more than there should be
                progress.add(-_size(part))
                part.unlink()
            elif 400 <= status < 500:
                raise
            tries = 0 if _size(part) > before else tries + 1
            if tries == TRIES:
                raise
            time.sleep(WAIT_SECONDS * 2 ** max(0, tries - 1))


def _meter(add: Callable[[int], None]) -> Callable:
    """What huggingface_hub takes for a class of progress bars."""

    class Meter:
        def __init__(self, **_: object) -> None:
            pass

        def update(self, count: int) -> None:
            add(count)

        def __enter__(self) -> "Meter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    return Meter


def hash_fits(path: Path, expected: str) -> bool:
    """Is it the SHA-256, the git blob's SHA-1 or the MD5 that `expected` has the look of? Anything
    else says nothing of the content, and fits."""
    expected = expected.lower()
    if not re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return True
    name = {32: "md5", 40: "sha1", 64: "sha256"}[len(expected)]
    digest = hashlib.new(name, usedforsecurity=False)
    if name == "sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == expected
