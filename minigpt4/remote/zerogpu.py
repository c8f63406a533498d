"""The engine on a ZeroGPU Space, where a GPU is lent for one answer at a time to a forked process.

The model is loaded to "cuda" before the page starts. The package `spaces`, which exists only there,
emulates this. An engine inside the process with the GPU then answers each request, and its tokens
come back one by one.
"""

import argparse
import os
import re
import threading
from collections.abc import Callable, Generator
from contextvars import copy_context
from typing import TYPE_CHECKING

from minigpt4 import start
from minigpt4.engine import Engine, Request, Stream
from minigpt4.engine.base import AnyEngine
from minigpt4.engine.scheduler import refuse_beyond_tokens
from minigpt4.engine.stream import ENDING, StopReason, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Picture

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

USUAL_MODEL = "vicuna-7b"  # in 16 bit: there is enough GPU memory, but not disk space and GPU time
NO_GPU = "No GPU is available for this answer"

# (token, log-probability) of each token, then the stop reason or the error.
Events = Generator[tuple[int, float | None] | StopReason | UserError, None, None]

# In the process with the GPU: the model comes with the fork; the first request creates the engine.
_model: "MiniGPT4 | None" = None
_engine: Engine | None = None


def is_here() -> bool:
    """Is this a ZeroGPU Space?"""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def open_engine(options: argparse.Namespace) -> "ZeroEngine":
    """Load the model and wrap `answer` so that it gets a GPU. Call it before the page starts."""
    import spaces

    global _model
    if options.model == "auto":
        options.model = USUAL_MODEL
    if options.quantize == "auto":
        options.quantize = "none"
    _model = start.open_model(options)
    return ZeroEngine(_model, spaces.GPU(duration=seconds)(answer), options.max_queue)


def seconds(request: Request) -> int:
    """The maximum time to borrow the GPU: shorter loans are granted sooner."""
    return 30 + request.sampling.max_new_tokens // 10


def answer(request: Request) -> Events:
    """The engine's answer, event by event. Runs in the process with the GPU."""
    global _engine
    if _model is None:
        raise RuntimeError("`open_engine` has not loaded the model")
    if _engine is None:
        _engine = Engine(_model, max_running=1, max_waiting=1, eager=True)
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


class ZeroEngine(AnyEngine):
    """The interface of an `Engine` for the page and the API, with a GPU loan for each request.

    lend: `answer` with a GPU; max_waiting: requests at once, which wait for GPUs in Hugging Face's
    queue.
    """

    def __init__(
        self, model: "MiniGPT4", lend: Callable[[Request], Events], max_waiting: int
    ) -> None:
        super().__init__(0, max_waiting)
        self.model, self._lend = model, lend
        self._running: list[Stream] = []

    @property
    def decoder_name(self) -> str:
        """The eager decoder: capturing graphs would take a large part of a loan."""
        return "PyTorch"

    @property
    def waiting(self) -> int:
        """Requests without a token yet."""
        with self._lock:
            return sum(not stream.stats.tokens for stream in self._running)

    @property
    def running(self) -> int:
        with self._lock:
            return sum(stream.stats.tokens > 0 for stream in self._running)

    def encode(self, picture: Picture) -> None:
        """Nothing: pictures are encoded with the answer, since a loan for each would cost more."""

    def _submit(self, request: Request) -> Stream:
        refuse_beyond_tokens(request)
        stream = Stream(lambda s: 0 if s.stats.tokens else 1, len(request.prompt))
        with self._lock:
            self._refuse_if_full()
            self._running.append(stream)
            self.totals.add(requests=1, prompt_tokens=len(request.prompt))
        # The context tells `spaces` whose GPU quota to use.
        work = copy_context().run
        threading.Thread(target=work, args=(self._follow, request, stream), daemon=True).start()
        return stream

    def _follow(self, request: Request, stream: Stream) -> None:
        events = None
        try:
            events = self._lend(request)
            for event in events:
                if stream.stop_reason:  # closed by its reader
                    break
                match event:
                    case (token, logprob):
                        stream._put(token, logprob)
                        self.totals.add(tokens=1)
                    case UserError():
                        raise event
                    case reason:
                        stream._end(reason)
        except UserError as error:
            self._fail(stream, error)
        except Exception as error:  # from `spaces`: the visitor's quota is used up, for example
            text = re.sub(r"<[^>]*>", "", str(getattr(error, "message", error)))
            self._fail(stream, UserError(f"{NO_GPU}: {' '.join(text.split())}", "broken"))
        finally:
            if events is not None:
                events.close()
            if not stream.stop_reason:
                self._fail(stream, UserError(f"{NO_GPU}.", "broken"))
            self._count(stream)
            with self._lock:
                self._running.remove(stream)

    def health(self, seconds: float = 10.0) -> bool:
        """True until it drains: only an answer shows whether a GPU is available."""
        return not self._ending

    def close(self) -> None:
        with self._lock:
            self._ending = True
            streams = [*self._running]
        for stream in streams:
            self._fail(stream, failure(ENDING))
