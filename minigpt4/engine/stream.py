"""The stream of an answer from the engine's thread to its reader, and the engine's statistics and
errors for people and programs. No torch."""

import asyncio
import contextlib
import copy
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from minigpt4.errors import Kind, UserError, out_of_memory

FULL = "Too many people are waiting at the moment; please try again soon."
BROKEN = "Something went wrong while answering; please try again."
NO_MEMORY = "There was not enough memory for this answer; try a shorter conversation."
HANGING = "The model stopped responding; please try again in a minute."
LOST = "The GPU has failed; the program must be restarted."
ENDING = "The program is ending; please try again in a minute."
StopReason = Literal["", "stop", "length", "time", "closed", "error"]
KINDS: dict[str, Kind] = {
    FULL: "queue_full",
    BROKEN: "broken",
    NO_MEMORY: "memory",
    HANGING: "hanging",
    LOST: "broken",
    ENDING: "ending",
}
# A forked process has none of the threads, and its locks may stay locked.
FORKED = "This model was loaded in another process: load it in this one."

# Upper bounds of the histograms' buckets: seconds of an answer, seconds of a token, tokens.
SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LENGTHS = (1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

# --- errors ---------------------------------------------------------------------------------------


def failure(sentence: str) -> UserError:
    """One of the sentences above as an error."""
    return UserError(sentence, KINDS[sentence])


def explain(error: Exception) -> UserError:
    """The error that a user sees for an exception."""
    return failure(sentence_for(error))


def sentence_for(error: Exception) -> str:
    """The sentence above that describes an exception."""
    if out_of_memory(error):
        return NO_MEMORY
    return LOST if device_lost(error) else BROKEN


def device_lost(error: Exception) -> bool:
    """Is this a CUDA error after which every further call fails, until the process is restarted?

    PyTorch raises them as AcceleratorError, older versions as RuntimeError ("CUDA error: …").
    """
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error:" in str(error)


# --- statistics -----------------------------------------------------------------------------------


@dataclass
class Stats:
    """Statistics of one answer. Seconds count from `submit`; 0 until the event has happened.

    reused_tokens: positions of the prompt whose keys and values were in the cache; gaps: seconds
    between each token and the one before.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    seconds_waiting: float = 0.0
    seconds_to_first: float = 0.0
    seconds: float = 0.0
    gaps: "Histogram" = field(default_factory=lambda: Histogram(*TOKEN_SECONDS))

    @property
    def tokens_per_s(self) -> float:
        """The speed after the first token."""
        lasted = self.seconds - self.seconds_to_first
        return (self.tokens - 1) / lasted if self.tokens > 1 and lasted > 0 else 0.0


class Histogram:
    """`counts[i]`: values up to `bounds[i]`; the last one: all larger values."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def __add__(self, other: "Histogram") -> "Histogram":
        """All values of both, which have the same bounds."""
        both = Histogram(*self.bounds)
        both.counts = [own + more for own, more in zip(self.counts, other.counts, strict=True)]
        both.sum = self.sum + other.sum
        return both


def _histogram(bounds: Sequence[float]) -> Histogram:
    return field(default_factory=lambda: Histogram(*bounds))


@dataclass
class Totals:
    """Statistics of an engine since it started, without health probes. The numbers only grow.

    errors: requests that were refused or failed, by `UserError.kind`; endings: answers by stop
    reason; tokens_per_s: of each answer of two tokens or more, after its first; gaps: seconds
    between two tokens. The other histograms are over answers that have a token: seconds from
    `submit` to the first token and to the end, in the queue, in prefill and after it; tokens of the
    prompt and of the answer. Several threads write: change it by its methods, and read several
    numbers together from a `snapshot`.
    """

    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    seconds_to_first: Histogram = _histogram(SECONDS)
    tokens_per_s: Histogram = _histogram((1, 2, 5, 10, 20, 50, 100, 200, 500))
    gaps: Histogram = _histogram(TOKEN_SECONDS)
    seconds: Histogram = _histogram(SECONDS)
    seconds_waiting: Histogram = _histogram(SECONDS)
    seconds_prefill: Histogram = _histogram(SECONDS)
    seconds_decode: Histogram = _histogram(SECONDS)
    prompt_lengths: Histogram = _histogram(LENGTHS)
    answer_lengths: Histogram = _histogram(LENGTHS)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Increase the counters of these names: requests, tokens, prompt_tokens, reused_tokens."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def add_error(self, kind: str) -> None:
        """Count a request that was refused or has failed."""
        with self._lock:
            self.errors[kind] += 1

    def add_answer(self, stats: Stats, ending: str = "") -> None:
        """Count an answer that has ended, for the reason `ending`."""
        with self._lock:
            self.endings[ending] += 1
            if stats.tokens_per_s:
                self.tokens_per_s.add(stats.tokens_per_s)
            if not stats.tokens:
                return
            self.seconds_to_first.add(stats.seconds_to_first)
            self.gaps += stats.gaps
            self.seconds.add(stats.seconds)
            self.seconds_waiting.add(stats.seconds_waiting)
            self.seconds_prefill.add(stats.seconds_to_first - stats.seconds_waiting)
            self.seconds_decode.add(stats.seconds - stats.seconds_to_first)
            self.prompt_lengths.add(stats.prompt_tokens)
            self.answer_lengths.add(stats.tokens)

    def snapshot(self) -> "Totals":
        """A copy whose numbers belong to the same moment."""
        with self._lock:
            return Totals(**{name: copy.deepcopy(getattr(self, name)) for name in _COUNTED})

    def merge(self, other: "Totals") -> None:
        """Add another engine's totals; `other` must be a snapshot."""
        with self._lock:
            for name in _COUNTED:
                setattr(self, name, getattr(self, name) + getattr(other, name))


_COUNTED = [field.name for field in fields(Totals) if field.name != "_lock"]


# --- the stream -----------------------------------------------------------------------------------


class Stream:
    """Token ids as they are generated, for `for` and `async for`; a stop id comes last.

    stop_reason: "" until the end, then "stop" (a stop id), "length", "time", "closed" or "error";
    iterating raises the error, as a UserError. logprobs: of each token, if the request asks for
    them; top_logprobs: (id, log-probability) of each step's most likely tokens; watched:
    log-probabilities of `Request.watched` as the first token; probe: tests the engine's health,
    does not wait and is not counted. `close`, from any thread, ends the request within one step of
    the engine.
    """

    def __init__(
        self, position: Callable[["Stream"], int], prompt_tokens: int, probe: bool = False
    ) -> None:
        self._position, self.probe = position, probe
        self._condition = threading.Condition()
        self._tokens: deque[int] = deque()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []
        self._error: UserError | None = None
        self._started = time.perf_counter()
        self.stop_reason: StopReason = ""
        self.stats = Stats(prompt_tokens=prompt_tokens)
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.watched: list[float] = []

    @property
    def position(self) -> int:
        """Place in the queue: 1 is next, 0 is running or ended."""
        return self._position(self)

    def close(self) -> None:
        """End the request; unread tokens are dropped."""
        self._end("closed")
        with self._condition:
            self._tokens.clear()

    # --- the engine's side ---------------------------------------------------------------------

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _put(
        self, token: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()
    ) -> None:
        with self._condition:
            if self.stop_reason:
                return
            self._tokens.append(token)
            self.stats.tokens += 1
            before, self.stats.seconds = self.stats.seconds, self._seconds()
            if self.stats.tokens == 1:
                self.stats.seconds_to_first = self.stats.seconds
            else:
                self.stats.gaps.add(self.stats.seconds - before)
            if logprob is not None:
                self.logprobs.append(logprob)
                self.top_logprobs.append([*top])
            self._notify()

    def _end(self, reason: StopReason, error: UserError | None = None) -> bool:
        """End the stream, unless it has ended already; True if this call ended it."""
        with self._condition:
            ends = not self.stop_reason
            if ends:
                self.stop_reason, self._error = reason, error
                self.stats.seconds = self._seconds()
            self._notify()
        return ends

    def _notify(self) -> None:
        self._condition.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                loop.call_soon_threadsafe(_wake, future)

    # --- the reader's side ---------------------------------------------------------------------

    def _take(self) -> int | None:
        """The next token, None if there is none yet; the end raises StopIteration or the error."""
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
