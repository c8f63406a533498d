"""AnyEngine: the interface of every engine, wherever its model runs, and the queue that all share.

`ask`, the page and the API use nothing else of an engine. No torch.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection
from typing import Any, Protocol, Self

from minigpt4.config import ModelConfig
from minigpt4.engine.scheduler import Request
from minigpt4.engine.stream import ENDING, FORKED, FULL, Stream, Totals, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, Picture


class ModelInfo(Protocol):
    """The attributes that are read of an engine's model: a `MiniGPT4`, or a description of one in
    another process.

    quantize: how its language model is loaded; device: where it runs, named by `str`.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def quantize(self) -> str: ...

    @property
    def device(self) -> object: ...


class AnyEngine(ABC):
    """`Engine`, `RemoteEngine` or `ZeroEngine`. Close it, or use it in `with`.

    max_running: answers at once; max_waiting: requests that may wait. totals: its statistics since
    it started. `_waiting` and `_running` are changed and iterated only while `_lock` is held.
    """

    model: ModelInfo

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.totals = Totals()
        self._lock = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._running: Collection[Any] = []
        self._ending = False
        self._fault = ""
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the engine; requests that are not answered yet get an error."""

    @abstractmethod
    def encode(self, picture: Picture) -> Encoded | None:
        """The picture's embeddings for the language model, computed once.

        None if they are computed with the answer. UserError if encoding fails.
        """

    @abstractmethod
    def health(self, seconds: float = 10.0) -> bool:
        """Whether the engine generates a token within `seconds`."""

    @abstractmethod
    def _submit(self, request: Request) -> Stream: ...

    def submit(self, request: Request) -> Stream:
        """Start answering. UserError if the queue is full or the request can never fit."""
        self._refuse_fork()
        try:
            return self._submit(request)
        except UserError as error:
            self.totals.add_error(error.kind)
            raise

    @property
    def decoder_name(self) -> str:
        """The decoder's name for people: "CUDA graphs", "PyTorch" …; here, "remote"."""
        return "remote"

    @property
    def fault(self) -> str:
        """A sentence while the engine cannot answer, else ""."""
        return self._fault or (ENDING if self._ending else "")

    @property
    def cache_use(self) -> float | None:
        """The share of the key-value cache in use; None if it is in another process."""
        return None

    @property
    def most(self) -> int:
        """Requests that may run and wait together."""
        return self.max_running + self.max_waiting

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    def refuse_if_full(self) -> None:
        """Raise the error that `submit` would raise now, before any work goes into a request."""
        try:
            with self._lock:
                self._refuse_if_full()
        except UserError as error:
            self.totals.add_error(error.kind)
            raise

    def drain(self, seconds: float) -> bool:
        """Take no more requests. True if those already taken end within `seconds`."""
        with self._lock:
            self._ending = True
        end = time.monotonic() + seconds
        while True:
            with self._lock:  # a request moves from waiting to running under the lock
                if not (self._waiting or self._running):
                    return True
            if time.monotonic() > end:
                return False
            time.sleep(0.02)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise UserError(FORKED)

    def _refuse_if_ending(self) -> None:
        if self._ending:
            raise failure(ENDING)

    def _refuse_if_full(self) -> None:
        """The lock is held."""
        self._refuse_if_ending()
        self._drop_closed()
        # A new request is in the queue first, even if it can run at once: so count both.
        if len(self._waiting) + len(self._running) >= self.most:
            raise failure(FULL)

    def _drop_closed(self) -> None:
        """Remove requests that ended while they waited. The lock is held."""
        waiting = self._waiting
        self._waiting = deque(state for state in waiting if not state.stream.stop_reason)
        for state in waiting:
            if state.stream.stop_reason:
                self._count(state.stream)

    def _count(self, stream: Stream) -> None:
        """Add an answer that has ended to the statistics."""
        if not stream.probe:
            self.totals.add_answer(stream.stats, stream.stop_reason)

    def _fail(self, stream: Stream, error: UserError) -> None:
        if stream._end("error", error) and not stream.probe:
            self.totals.add_error(error.kind)

    def _position(self, stream: Stream) -> int:
        """Place in the queue, from 1; 0 if it is not in the queue."""
        with self._lock:
            self._drop_closed()
            places = enumerate(self._waiting, 1)
            return next((place for place, state in places if state.stream is stream), 0)
