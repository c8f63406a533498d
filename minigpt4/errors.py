"""UserError, the one kind of error a user may see; and how progress is reported."""

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TextIO

Kind = Literal[
    "request", "too_long", "queue_full", "loading", "memory", "broken", "hanging", "ending"
]

UNUSABLE_PROXY = (
    "The environment names a proxy or certificates that cannot be used: check HTTP_PROXY, "
    "HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE."
)


class UserError(Exception):
    """A mistake that a user can correct: one sentence that says what is wrong and what to do.

    kind: the error's kind, for programs. "request": the request must change; "too_long": it does
    not fit the model's context; "loading": there is no engine yet; the others are the engine's own,
    after which the same request may succeed.

    message_id, values: the sentence's key and parameters, with which the page translates it.
    Without a message_id, `kind` is the key; without a translation, the sentence stays English.
    """

    def __init__(
        self,
        sentence: str,
        kind: Kind = "request",
        message_id: str = "",
        values: Mapping[str, object] | None = None,
    ) -> None:
        # All arguments go into `args`, with which an exception is pickled.
        super().__init__(sentence, kind, message_id, dict(values or {}))
        self.sentence = sentence
        self.kind: Kind = kind
        self.message_id = message_id or kind
        self.values = dict(values or {})

    def __str__(self) -> str:
        return self.sentence


DISK_FULL = {  # error number -> the rest of a sentence that begins with the disk
    errno.ENOSPC: "is full: make room",
    errno.EDQUOT: "is full up to your quota: make room",
    errno.EFBIG: "takes no larger file: raise the limit (ulimit -f), or name a file elsewhere",
}
_SHORT = (
    *("out of memory", "allocate memory", "bad_alloc", "not enough memory", "bad allocation"),
    "failed to map segment",  # of a library that is being imported
)


def out_of_memory(error: BaseException) -> bool:
    """Does an exception say that memory is short? It may be Python's, the system's, or a library's,
    recognised by its name or text, so that no library is imported for this."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    kinds = (RuntimeError, ImportError)
    return isinstance(error, kinds) and any(text in str(error) for text in _SHORT)


def quiet_hub() -> None:
    """Keep the Hugging Face hub's client from logging each of its tries, which take half a minute:
    our own sentence follows."""
    for name in ("file_download", "utils._http"):
        logging.getLogger(f"huggingface_hub.{name}").setLevel(logging.ERROR)


def hub_has_client() -> bool:
    """Whether the hub's client can be made, which fails if the environment's proxies, such as
    Ubuntu's socks://…, cannot be used."""
    from huggingface_hub import get_session

    try:
        get_session()
    except Exception:
        return False
    return True


class Step(str):
    """A line about progress, in English; the page translates it by its key and values. A value may
    be a Step, too."""

    key: str
    values: dict[str, str]

    def __new__(cls, key: str, text: str, **values: str) -> "Step":
        step = super().__new__(cls, text.format(**values))
        step.key, step.values = key, values
        return step

    def __getnewargs_ex__(self) -> tuple[tuple[str, str], dict[str, str]]:
        """For `copy` and `pickle`, which restore the values themselves."""
        return (self.key, str(self).replace("{", "{{").replace("}", "}}")), {}


Count = Callable[[int], None]  # called with the number of further bytes that are done


def ignore(count: int) -> None:
    """A `Count` that does nothing."""


class Report(Protocol):
    """Receives one line about the current step. passing: another line will soon replace it."""

    def __call__(self, line: str, passing: bool = False) -> None: ...


def say(line: str, passing: bool = False) -> None:
    """Print a line to stderr, unless it is passing: a progress bar shows the same."""
    if not passing:
        print(line, file=sys.stderr, flush=True)


class Unfailing:
    """A stream that drops text that cannot be written, instead of raising.

    For standard error: Gradio writes a traceback there before it answers the visitor. If that
    raised, as with a log on a full disk, the visitor would get no answer.
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
