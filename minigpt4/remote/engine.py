"""The engine's counterpart where other processes run the language model.

It takes the same requests and gives the same streams as `Engine`: a queue, a limit of answers at
once, cancelling, time limits. Where the process that answers dies, the answer goes on from its last
token at another one: nothing is lost but time. How a process is reached is the backend's to know.
"""

import asyncio
import atexit
import contextlib
import contextvars
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from minigpt4.engine.faults import BROKEN, ENDING, fault
from minigpt4.engine.queue import Queue
from minigpt4.engine.stream import Stream
from minigpt4.engine.task import Request, answer_limit
from minigpt4.errors import UserError
from minigpt4.model.image import Picture

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

UNREACHABLE = "The language model's servers do not answer; please try again in a minute."

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """This process cannot answer, and another may. `error`: what to say where none does."""

    def __init__(self, reason: str, error: UserError | None = None) -> None:
        super().__init__(reason)
        self.error = error or UserError(UNREACHABLE, "hanging")


@dataclass(frozen=True)
class Part:
    """Some tokens of an answer; `logprobs` of each, where they were asked for; `ended`: why these
    were the last. reused_tokens: of the prompt, where that is known."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""
    reused_tokens: int = 0


class Backend(Protocol):
    """Processes that run the language model. Its coroutines all run in one loop.

    attempts: how many tries, one after the other and without a token, end an answer.
    pause: seconds between two of them.
    """

    attempts: int
    pause: float

    def check(self, request: Request) -> None:
        """UserError where these processes cannot do what is asked."""

    def encode(self, picture: Picture) -> np.ndarray:
        """The picture's embeddings, float32 [image_tokens, llm_hidden_size]. Blocks."""

    def generate(self, request: Request, said: list[int], limit: int) -> AsyncIterator[Part]:
        """What follows the prompt and the tokens `said`, at most `limit` tokens. Unavailable where
        another try may help, UserError where none will."""

    async def probe(self, seconds: float) -> bool:
        """Does any of them give a real token in time?"""

    async def close(self) -> None:
        """Nothing is asked any more."""


class RemoteStream(Stream):
    """A stream whose `close` also reaches the answer that waits for another machine."""

    cancel: asyncio.Task | None = None

    def close(self) -> None:
        super().close()
        if self.cancel is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.cancel.get_loop().call_soon_threadsafe(self.cancel.cancel)


@dataclass(eq=False)
class _Job:
    """context: the asker's. Ray tells the requests that it routes apart by what stands there."""

    request: Request
    stream: RemoteStream
    limit: int
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class RemoteEngine(Queue):
    """As `Engine`, with the language model elsewhere.

    model: its configuration and tokenizer are used here, the rest is the backend's.
    """

    def __init__(
        self, model: "MiniGPT4", backend: Backend, max_running: int = 32, max_waiting: int = 64
    ) -> None:
        super().__init__(max_running, max_waiting)
        self.model, self.backend = model, backend
        self.fault = ""  # a sentence while the last probe failed
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="remote engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- what callers use ----------------------------------------------------------------------

    def encode(self, picture: Picture) -> np.ndarray:
        """The picture's embeddings, float32 [image_tokens, llm_hidden_size], computed once."""
        return self.backend.encode(picture)

    def submit(self, request: Request) -> Stream:
        """Start answering. UserError where the queue is full, or this cannot be asked."""
        try:
            limit = answer_limit(request, self.model.config.context)
            self.backend.check(request)
            job = _Job(request, RemoteStream(self._position, len(request.prompt)), limit)
            with self._lock:
                self._refuse_any()
                self._waiting.append(job)
                self.totals.requests += 1
                # Within the lock, for which `close` waits: the loop is there still.
                self._loop.call_soon_threadsafe(self._start_some)
        except UserError as error:
            self.totals.errors[error.kind] += 1
            raise
        return job.stream

    def health(self, seconds: float = 10.0) -> bool:
        """Does a real token come from any of the processes within `seconds`?"""
        if self._ending:
            return False
        try:
            healthy = self.call(self.backend.probe(seconds), seconds + 1)
        except TimeoutError:
            healthy = False
        self.fault = "" if healthy else UNREACHABLE
        return healthy

    def call(self, work: Coroutine, seconds: float):
        """What a coroutine gives that runs in the backend's loop; TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        finally:
            future.cancel()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and let those that were taken end: did they, within `seconds`?"""
        self._ending = True
        return self._drained(seconds)

    def close(self) -> None:
        """End; whoever waits gets an error."""
        atexit.unregister(self.close)
        self._ending = True
        if self._loop.is_closed():
            return
        with self._lock:
            jobs = [*self._waiting, *self._running]
            self._waiting.clear()
        for job in jobs:
            self._fail(job, fault(ENDING))
        with contextlib.suppress(TimeoutError):
            self.call(self._end(), 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    # --- the loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _end(self) -> None:
        tasks = [job.stream.cancel for job in self._running if job.stream.cancel is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.backend.close()

    def _refuse_any(self) -> None:
        if self._ending:
            raise fault(ENDING)
        self._drop_ended()
        super()._refuse_any()

    def _drop_ended(self) -> None:
        """Requests that were closed while they waited take nobody's place. The lock is held."""
        self._waiting = deque(job for job in self._waiting if not job.stream.stop_reason)

    def _position(self, stream: Stream) -> int:
        with self._lock:
            self._drop_ended()
            return next((i for i, job in enumerate(self._waiting, 1) if job.stream is stream), 0)

    def _start_some(self) -> None:
        """Begin to answer those who have waited longest."""
        with self._lock:
            self._drop_ended()
            while self._waiting and len(self._running) < self.max_running:
                job = self._waiting.popleft()
                self._running.add(job)
                job.stream.cancel = self._loop.create_task(self._answer(job), context=job.context)

    async def _answer(self, job: _Job) -> None:
        stream = job.stream
        stream.stats.seconds_waiting = stream._seconds()
        self.totals.prompt_tokens += stream.stats.prompt_tokens
        try:
            if stream.stop_reason:  # closed between the queue and here
                return
            async with asyncio.timeout(job.request.max_seconds - stream._seconds()):
                await self._generate(job)
        except TimeoutError:
            stream._end("time")
        except asyncio.CancelledError:  # nobody wants it any more
            stream._end("closed")
        except UserError as error:
            self._fail(job, error)
        except Exception:
            log.exception("while answering")
            self._fail(job, fault(BROKEN))
        finally:
            self.totals.reused_tokens += stream.stats.reused_tokens
            self.totals.note_end(stream.stats)
            with self._lock:
                self._running.discard(job)
            self._start_some()

    async def _generate(self, job: _Job) -> None:
        """The answer, at as many processes one after the other as it takes."""
        said: list[int] = []
        failures = 0
        while not job.stream.stop_reason:
            before = len(said)
            parts = self.backend.generate(job.request, said, job.limit - len(said))
            try:
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        self._give(job, part, said)
                        if job.stream.stop_reason:
                            return
                raise Unavailable("it ended in the middle of an answer")
            except Unavailable as error:
                failures = failures + 1 if len(said) == before else 1
                log.warning("an answer goes on elsewhere after %d tokens: %s", len(said), error)
                if failures >= self.backend.attempts:
                    raise error.error from None
                await asyncio.sleep(self.backend.pause)

    def _give(self, job: _Job, part: Part, said: list[int]) -> None:
        stream = job.stream
        if part.reused_tokens and not stream.stats.reused_tokens:
            stream.stats.reused_tokens = min(part.reused_tokens, stream.stats.prompt_tokens)
        logprobs = part.logprobs or [None] * len(part.tokens)
        for token, logprob in zip(part.tokens, logprobs, strict=True):
            said.append(token)
            stream._put(token, logprob)
            self.totals.tokens += 1
            if token in job.request.stop_ids:
                stream._end("stop")
            elif len(said) >= job.limit:
                stream._end("length")
            if stream.stop_reason:
                return
        if part.ended:
            stream._end(part.ended)

    def _fail(self, job: _Job, error: UserError) -> None:
        if not job.stream.stop_reason:
            self.totals.errors[error.kind] += 1
        job.stream._end("error", error)
