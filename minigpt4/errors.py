"""UserError, the one kind of error a user may see; and how progress is reported."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TextIO

Kind = Literal[
    "request", "too_long", "queue_full", "loading", "memory", "broken", "hanging", "ending"
]


class UserError(Exception):
    """A mistake that a user can correct: one sentence that says what is wrong and what to do.

    kind: the same for programs. "request": the request must change; "too_long": it does not fit the
    model's context; "loading": there is no engine yet; the others are the engine's own, after which
    the same request may succeed.

    message_id, values: the sentence's name and parameters, by which the page finds it in the
    visitor's language. Without a message_id, `kind` is looked up; what is not found stays English.
    """

    def __init__(
        self,
        sentence: str,
        kind: Kind = "request",
        message_id: str = "",
        values: Mapping[str, object] | None = None,
    ) -> None:
        # All of it goes into `args`, with which an exception is pickled.
        super().__init__(sentence, kind, message_id, dict(values or {}))
        self.sentence = sentence
        self.kind: Kind = kind
        self.message_id = message_id or kind
        self.values = dict(values or {})

    def __str__(self) -> str:
        return self.sentence


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
