"""UserError, the only kind of error that a user sees, and how progress is reported."""

import contextlib
import sys
from typing import Any, Literal, Protocol, TextIO

Kind = Literal[
    "request", "too_long", "queue_full", "loading", "memory", "broken", "hanging", "ending"
]


class UserError(Exception):
    """One sentence that says what is wrong and what to do.

    kind: the same for programs. "request": the request is invalid. "too_long": it exceeds the
    model's context. The other kinds concern the engine, and the same request may succeed later;
    "loading" means that the model is not loaded yet.
    """

    def __init__(self, sentence: str, kind: Kind = "request") -> None:
        super().__init__(sentence)
        self.kind: Kind = kind


class Report(Protocol):
    """Receives one line about the current step. passing: another line will soon replace it."""

    def __call__(self, line: str, passing: bool = False) -> None: ...


def say(line: str, passing: bool = False) -> None:
    """Print a line to stderr; passing ones are left out, as a progress bar shows the same."""
    if not passing:
        print(line, file=sys.stderr, flush=True)


class Unfailing:
    """A stream that drops what cannot be written, instead of raising.

    Gradio writes a traceback to standard error before it answers the visitor. If that raised, as
    with a log on a full disk, the visitor would wait forever.
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
