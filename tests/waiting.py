"""Waiting in tests: until something is the case, and for the server of a program."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


def until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Does it come true in time?"""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    assert until(condition, seconds), "waited in vain"


def responds(url: str) -> bool:
    try:
        return httpx.get(url, timeout=20).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def program(command: Sequence[str], address: str, log: Path, **settings) -> Iterator[None]:
    """The command's server at `address`, ready to answer; its end by SIGTERM is a success."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **settings)
    try:
        ready = until(lambda: responds(f"{address}/readyz") or process.poll() is not None, 180)
        assert ready and process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0
