"""UserError, the one kind of error a user may see; and how progress is reported."""

import contextlib
import sys
from typing import Any, Literal, Protocol, TextIO

Kind = Literal[
    "request", "too_long", "queue_full", "loading", "memory", "broken", "hanging", "ending"
]


class UserError(Exception):
    """A mistake a user can mend: one sentence that says what is wrong and what to do.

    `kind` says the same to programs: "request" (it must change), "too_long" (for the model's
    context), and those of the engine, after which the same request may do later. "loading": there
    is none yet.
    """

    def __init__(self, sentence: str, kind: Kind = "request") -> None:
        super().__init__(sentence)
        self.kind: Kind = kind


class Report(Protocol):
    """Receives one line about the current step. passing: another line will soon replace it."""

    def __call__(self, line: str, passing: bool = False) -> None: ...


def say(line: str, passing: bool = False) -> None:
    """Print a line to stderr. Passing ones are left out, as a progress bar shows the same."""
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
