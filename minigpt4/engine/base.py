"""AnyEngine: what every engine offers, wherever its model runs, and the queue that all share.

`ask`, the page and the API use no more of an engine than this. No torch.
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
    """What is read of an engine's model: a `MiniGPT4`, or a description of one elsewhere.

    quantize: how its language model is loaded; device: where it runs; `str` names it.
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

    max_running: answers at once; max_waiting: requests that may wait. totals: what it has done
    since it started. `_waiting` and `_running` are changed and iterated only while `_lock` is held.
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
        """End everything; requests that are not answered yet get an error."""

    @abstractmethod
    def encode(self, picture: Picture) -> Encoded | None:
        """What the language model takes of the picture, computed once.

        None where that is computed with the answer. UserError where that fails.
        """

    @abstractmethod
    def health(self, seconds: float = 10.0) -> bool:
        """Whether the engine generates a token within `seconds`."""

    @abstractmethod
    def _submit(self, request: Request) -> Stream: ...

    def submit(self, request: Request) -> Stream:
        """Start answering. UserError where the queue is full or the request can never fit."""
        self._refuse_fork()
        try:
            return self._submit(request)
        except UserError as error:
            self.totals.add_error(error.kind)
            raise

    @property
    def decoder_name(self) -> str:
        """What runs the language model, for people: "CUDA graphs", "PyTorch" …; here, other
        machines."""
        return "remote"

    @property
    def fault(self) -> str:
        """A sentence while the engine cannot answer, else ""."""
        return self._fault or (ENDING if self._ending else "")

    @property
    def cache_use(self) -> float | None:
        """The share of the key-value cache in use; None where it is in another process."""
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
            with self._lock:  # a request moves from the one to the other under the lock
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
        # Who has just come is in the queue, although there may be a place to run.
        if len(self._waiting) + len(self._running) >= self.most:
            raise failure(FULL)

    def _drop_closed(self) -> None:
        """Requests that ended while they waited leave the queue. The lock is held."""
        waiting = self._waiting
        self._waiting = deque(state for state in waiting if not state.stream.stop_reason)
        for state in waiting:
            if state.stream.stop_reason and not state.probe:
                self.totals.add_answer(state.stream.stats, state.stream.stop_reason)

    def _position(self, stream: Stream) -> int:
        """Place in the queue, from 1; 0 where it is not in the queue."""
        with self._lock:
            self._drop_closed()
            places = enumerate(self._waiting, 1)
            return next((place for place, state in places if state.stream is stream), 0)
