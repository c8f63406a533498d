"""Programs of the tests' own, servers among them; and waiting until something is the case."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


def python(
    *arguments: str,
    status: int = 0,
    said: str | None = None,
    cwd: Path = ROOT,
    seconds: float = 600,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, environment variables and standard input, to its end.

    It must end with this status.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        input=said,
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


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
def server(
    *arguments: str, address: str, log: Path, cwd: Path = ROOT, **variables: str
) -> Iterator[None]:
    """Python serving at `address`, ready to answer; its end by SIGTERM is a success."""
    command = [sys.executable, *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | variables, stdout=file, stderr=file
        )
    try:
        ready = until(lambda: responds(f"{address}/readyz") or process.poll() is not None, 180)
        assert ready and process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0
