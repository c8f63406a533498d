"""The engine's counterpart for a language model in other processes.

It takes the same requests and returns the same streams as `Engine`, with the same queue, limits and
cancelling. If the process that answers dies, another one continues from the last token: only time
is lost. Only the backend knows how a process is reached.
"""

import asyncio
import atexit
import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from minigpt4.engine.base import AnyEngine, ModelInfo
from minigpt4.engine.scheduler import Request, answer_limit, refuse_beyond_tokens
from minigpt4.engine.stream import BROKEN, ENDING, Stream, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, Picture

UNREACHABLE = "The language model's servers do not answer; please try again in a minute."

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """This process cannot answer, but another may. `error`: for the user, if none can."""

    def __init__(self, reason: str, error: UserError | None = None) -> None:
        super().__init__(reason)
        self.error = error or UserError(UNREACHABLE, "hanging")


@dataclass(frozen=True)
class Part:
    """Some tokens of an answer. logprobs: of each, if the request asks for them; ended: why these
    are the last ones; reused_tokens: of the prompt, if known."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""
    reused_tokens: int = 0


class Backend(Protocol):
    """Processes that run the language model. All of its coroutines run in one event loop.

    attempts: tries in a row without a token before an answer fails. pause: seconds between tries.
    """

    attempts: int
    pause: float

    def check(self, request: Request) -> None:
        """UserError if these processes cannot answer such a request."""

    def encode(self, picture: Picture) -> Encoded:
        """The encoded picture for the language model. Blocks until it is there."""

    def generate(
        self, request: Request, generated: list[int], limit: int
    ) -> AsyncGenerator[Part, None]:
        """At most `limit` tokens that follow the prompt and the tokens generated so far.

        Unavailable if another try may succeed, UserError if none can.
        """

    async def probe(self, seconds: float) -> bool:
        """Does any process generate a valid token in time?"""

    async def close(self) -> None:
        """End all connections."""


class RemoteStream(Stream):
    """A stream whose `close` also cancels an answer that waits for another process."""

    task: asyncio.Task | None = None

    def close(self) -> None:
        super().close()
        if self.task is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.task.get_loop().call_soon_threadsafe(self.task.cancel)


@dataclass(eq=False)
class _RequestState:
    """context: the caller's, by which Ray identifies the request that it routes."""

    request: Request
    stream: RemoteStream
    limit: int
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class RemoteEngine(AnyEngine):
    """Like `Engine`, with the language model in other processes.

    model: its configuration and tokenizer; the backend uses the rest.
    """

    def __init__(
        self, model: ModelInfo, backend: Backend, max_running: int = 32, max_waiting: int = 64
    ) -> None:
        super().__init__(max_running, max_waiting)
        self.model, self.backend = model, backend
        self._running: set[_RequestState] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="remote engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- what callers use ----------------------------------------------------------------------

    def encode(self, picture: Picture) -> Encoded:
        return self.backend.encode(picture)

    def _submit(self, request: Request) -> Stream:
        limit = answer_limit(request, self.model.config.context)
        refuse_beyond_tokens(request)
        self.backend.check(request)
        stream = RemoteStream(self._position, len(request.prompt))
        with self._lock:
            self._refuse_if_full()
            self._waiting.append(_RequestState(request, stream, limit))
            self.totals.add(requests=1)
            # Under the lock, which `close` needs, too: so the loop still exists.
            self._loop.call_soon_threadsafe(self._start_some)
        return stream

    def health(self, seconds: float = 10.0) -> bool:
        if self._ending:
            return False
        try:
            healthy = self.call(self.backend.probe(seconds), seconds + 1)
        except TimeoutError:
            healthy = False
        self._fault = "" if healthy else UNREACHABLE
        return healthy

    def call(self, work: Coroutine, seconds: float):
        """Run a coroutine in the backend's loop. Returns its result, or raises TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        finally:
            future.cancel()

    def close(self) -> None:
        """End the loop; requests that are not answered yet get an error."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:
            return
        with self._lock:
            self._ending = True
            states = [*self._waiting, *self._running]
            self._waiting.clear()
        if self._loop.is_closed():
            return
        for state in states:
            self._fail(state.stream, failure(ENDING))
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
        with self._lock:
            tasks = [state.stream.task for state in self._running if state.stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.backend.close()

    def _start_some(self) -> None:
        """Start the requests that have waited longest, while there are places."""
        with self._lock:
            self._drop_closed()
            while self._waiting and len(self._running) < self.max_running:
                state = self._waiting.popleft()
                self._running.add(state)
                state.stream.task = self._loop.create_task(
                    self._answer(state), context=state.context
                )

    async def _answer(self, state: _RequestState) -> None:
        stream = state.stream
        stream.stats.seconds_waiting = stream._seconds()
        self.totals.add(prompt_tokens=stream.stats.prompt_tokens)
        try:
            if stream.stop_reason:  # closed after it left the queue
                return
            async with asyncio.timeout(state.request.max_seconds - stream._seconds()):
                await self._generate(state)
        except TimeoutError:
            stream._end("time")
        except asyncio.CancelledError:
            stream._end("closed")
        except UserError as error:
            self._fail(state.stream, error)
        except Exception:
            log.exception("while answering")
            self._fail(state.stream, failure(BROKEN))
        finally:
            self.totals.add(reused_tokens=stream.stats.reused_tokens)
            self._count(stream)
            with self._lock:
                self._running.discard(state)
            self._start_some()

    async def _generate(self, state: _RequestState) -> None:
        """The whole answer, from one process after another if they fail."""
        generated: list[int] = []
        failures = 0
        while not state.stream.stop_reason:
            before = len(generated)
            parts = self.backend.generate(state.request, generated, state.limit - before)
            try:
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        self._give(state, part, generated)
                        if state.stream.stop_reason:
                            return
                raise Unavailable("it ended in the middle of an answer")
            except Unavailable as error:
                failures = failures + 1 if len(generated) == before else 1
                log.warning("retrying an answer after %d tokens: %s", len(generated), error)
                if failures >= self.backend.attempts:
                    raise error.error from None
                await asyncio.sleep(self.backend.pause)

    def _give(self, state: _RequestState, part: Part, generated: list[int]) -> None:
        stream = state.stream
        if part.reused_tokens and not stream.stats.reused_tokens:
            stream.stats.reused_tokens = min(part.reused_tokens, stream.stats.prompt_tokens)
        logprobs: Sequence[float | None] = part.logprobs or [None] * len(part.tokens)
        for token, logprob in zip(part.tokens, logprobs, strict=True):
            generated.append(token)
            stream._put(token, logprob)
            self.totals.add(tokens=1)
            if token in state.request.stop_ids:
                stream._end("stop")
            elif len(generated) >= state.limit:
                stream._end("length")
            if stream.stop_reason:
                return
        if part.ended:
            stream._end(part.ended)
