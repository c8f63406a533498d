"""One request's answer on its way from the engine's thread to whoever reads it. No torch."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from minigpt4.errors import UserError


@dataclass
class Stats:
    """What an answer took. Seconds count from `submit`; 0 where it has not come to that.

    reused_tokens: positions of the prompt whose keys and values were there already.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    seconds_waiting: float = 0.0
    seconds_to_first: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """After the first token."""
        lasted = self.seconds - self.seconds_to_first
        return (self.tokens - 1) / lasted if self.tokens > 1 and lasted > 0 else 0.0


class Stream:
    """Token ids as they are generated, for `for` and `async for`; a stop id comes last.

    stop_reason: "" while it goes on, then "stop" (a stop id), "length", "time", "closed" or
    "error"; an error is raised by the iteration, as a UserError. `logprobs`: of each token, where
    the request asked for them; `watched`: of the ids it named, as the first token, whatever came.
    `close`, from any thread, ends it within a step of the engine.
    """

    def __init__(self, position: Callable[["Stream"], int], prompt_tokens: int) -> None:
        self._position = position
        self._condition = threading.Condition()
        self._tokens: deque[int] = deque()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []
        self._error: UserError | None = None
        self._started = time.perf_counter()
        self.stop_reason = ""
        self.stats = Stats(prompt_tokens=prompt_tokens)
        self.logprobs: list[float] = []
        self.watched: list[float] = []

    @property
    def position(self) -> int:
        """Place in the queue, 1 is next; 0 when it is being answered or has ended."""
        return self._position(self)

    def close(self) -> None:
        """End the request; what was not read yet is dropped."""
        self._end("closed")
        with self._condition:
            self._tokens.clear()

    # --- the engine's side ---------------------------------------------------------------------

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _put(self, token: int, logprob: float | None) -> None:
        with self._condition:
            if self.stop_reason:
                return
            self._tokens.append(token)
            self.stats.tokens += 1
            self.stats.seconds = self._seconds()
            if self.stats.tokens == 1:
                self.stats.seconds_to_first = self.stats.seconds
            if logprob is not None:
                self.logprobs.append(logprob)
            self._notify()

    def _end(self, reason: str, error: UserError | None = None) -> None:
        with self._condition:
            if not self.stop_reason:
                self.stop_reason, self._error = reason, error
                self.stats.seconds = self._seconds()
            self._notify()

    def _notify(self) -> None:
        self._condition.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # its loop has closed: nobody waits there
                loop.call_soon_threadsafe(_wake, future)

    # --- the reader's side ---------------------------------------------------------------------

    def _take(self) -> int | None:
        """The next token, None where there is none yet; StopIteration or the error at the end."""
        if self._tokens:
            return self._tokens.popleft()
        if self.stop_reason:
            error, self._error = self._error, None
            raise error or StopIteration
        return None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        with self._condition:
            while (token := self._take()) is None:
                self._condition.wait()
        return token

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> int:
        while True:
            with self._condition:
                try:
                    token = self._take()
                except StopIteration:
                    raise StopAsyncIteration from None
                if token is not None:
                    return token
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiters.append((loop, future))
            await future


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
