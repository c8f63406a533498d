"""On a ZeroGPU Space: a GPU is lent for one answer at a time, to a process forked for it.

The model is loaded to “cuda” before the page starts, as the package `spaces` (which is there alone)
emulates it; each request is then answered by an engine within the process that has the GPU, and its
tokens come back one by one.
"""

import argparse
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import TYPE_CHECKING

from minigpt4 import start
from minigpt4.engine import Engine, Request
from minigpt4.engine.faults import ENDING, FULL
from minigpt4.engine.stream import Stream
from minigpt4.engine.totals import Totals
from minigpt4.errors import UserError
from minigpt4.model.image import Picture

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

USUAL_MODEL = "vicuna-7b"  # in 16 bit: the GPU is big, the disk and the lent seconds are not
NO_GPU = "No GPU could be had for this answer"

# What a request's process has: the fork brings the model, the first request there makes the engine.
_model: "MiniGPT4 | None" = None
_engine: Engine | None = None


def is_here() -> bool:
    """Is this a ZeroGPU Space?"""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def open_engine(options: argparse.Namespace) -> "ZeroEngine":
    """Load the model and make `answer` a function that is given a GPU. Before the page starts."""
    import spaces

    global _model
    if options.model == "auto":
        options.model = USUAL_MODEL
    if options.quantize == "auto":
        options.quantize = "none"
    _model = start.open_model(options)
    return ZeroEngine(_model, spaces.GPU(duration=seconds)(answer), options.max_queue)


def seconds(request: Request) -> int:
    """For how long to borrow the GPU, at most: short loans come sooner."""
    return 30 + request.sampling.max_new_tokens // 10


def answer(request: Request) -> Iterator[tuple[int, float | None] | str | UserError]:
    """In the process with the GPU: (token, log-probability) as they come, then the stop reason, or
    what went wrong."""
    global _engine
    if _engine is None:
        _engine = Engine(_model, max_running=1, max_waiting=1)
    try:
        stream = _engine.submit(request)
        try:
            for count, token in enumerate(stream):
                yield token, stream.logprobs[count] if request.logprobs else None
        finally:
            stream.close()
        yield stream.stop_reason
    except UserError as error:
        yield error


class ZeroEngine:
    """What the page and the API use of an `Engine`, each request in a loan of its own.

    lend: `answer` with a GPU; max_waiting: requests at once, which wait for GPUs elsewhere.
    """

    fault = ""

    def __init__(
        self, model: "MiniGPT4", lend: Callable[[Request], Iterator], max_waiting: int
    ) -> None:
        self.model, self.totals = model, Totals()
        self._lend, self._max_waiting = lend, max_waiting
        self._lock, self._ended = threading.Lock(), threading.Condition()
        self._streams: list[Stream] = []
        self._draining = False

    @property
    def waiting(self) -> int:
        """Requests without a token yet."""
        return sum(not s.stats.tokens for s in [*self._streams])

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._streams) - self.waiting

    def encode(self, picture: Picture) -> None:
        """Nothing: pictures are encoded with the answer, since a loan for each would cost more."""

    def refuse_if_full(self) -> None:
        """Raise what `submit` would raise of any request now."""
        if self._draining:
            raise UserError(ENDING, "ending")
        if len(self._streams) >= self._max_waiting:
            self.totals.errors["queue_full"] += 1
            raise UserError(FULL, "queue_full")

    def submit(self, request: Request) -> Stream:
        """Start answering."""
        with self._lock:
            self.refuse_if_full()
            stream = Stream(lambda s: 0 if s.stats.tokens else 1, len(request.prompt))
            self._streams.append(stream)
        self.totals.requests += 1
        # The context tells `spaces` whose GPU quota it is.
        work = copy_context().run
        threading.Thread(target=work, args=(self._follow, request, stream), daemon=True).start()
        return stream

    def _follow(self, request: Request, stream: Stream) -> None:
        lent = self._lend(request)
        try:
            for said in lent:
                if stream.stop_reason:  # closed by its reader
                    break
                match said:
                    case (token, logprob):
                        stream._put(token, logprob)
                        self.totals.tokens += 1
                    case UserError():
                        raise said
                    case reason:
                        stream._end(reason)
        except UserError as error:
            self._fail(stream, error)
        except Exception as error:  # of `spaces`: the visitor's quota is used up, for example
            text = re.sub(r"<[^>]*>", "", str(getattr(error, "message", error)))
            self._fail(stream, UserError(f"{NO_GPU}: {' '.join(text.split())}", "broken"))
        finally:
            lent.close()
            stream._end("error", UserError(f"{NO_GPU}.", "broken"))  # where nothing ended it yet
            self.totals.note_end(stream.stats)
            with self._ended:
                self._streams.remove(stream)
                self._ended.notify_all()

    def _fail(self, stream: Stream, error: UserError) -> None:
        self.totals.errors[error.kind] += 1
        stream._end("error", error)

    def health(self, seconds: float = 10.0) -> bool:
        """The model is loaded; whether a GPU can be had, only an answer can tell."""
        return not self._draining

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and let those that were taken end: did they, within `seconds`?"""
        with self._lock:  # nobody is between being let in and being counted
            self._draining = True
        with self._ended:
            return self._ended.wait_for(lambda: not self._streams, seconds)

    def close(self) -> None:
        """End every answer."""
        self._draining = True
        for stream in [*self._streams]:
            stream._end("error", UserError(ENDING, "ending"))
