"""Telling people what a long-lasting piece of work is at."""

import contextlib
import sys
from typing import Any, Protocol, TextIO


class Report(Protocol):
    """Is told in one line what is being done; passing: soon to be replaced by another line."""

    def __call__(self, line: str, passing: bool = False) -> None: ...


def say(line: str, passing: bool = False) -> None:
    """A line for the person who started the program, who sees a bar for what is passing."""
    if not passing:
        print(line, file=sys.stderr, flush=True)


class Unfailing:
    """A stream that forgets what cannot be written, where another would raise.

    Gradio writes tracebacks to standard error before it tells the visitor: with a log on a full
    disk, he would wait for ever.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
