"""GET /healthz: the process runs. GET /readyz: each model generates a token within ten seconds."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from minigpt4.engine import AnyEngine
from minigpt4.web.api.service import LOADING

log = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
FRESH_SECONDS = 1.0  # a result this young is reused
NO_TOKEN = "The model generates no tokens."


class Health:
    """find_engines: the models' engines, none while they are loading."""

    def __init__(
        self, find_engines: Callable[[], Sequence[AnyEngine]], probe_seconds: float = PROBE_SECONDS
    ) -> None:
        self._find_engines, self._probe_seconds = find_engines, probe_seconds
        self._probe: asyncio.Task | None = None
        self._ended = 0.0
        self.routes = [Route("/healthz", self._alive), Route("/readyz", self._ready)]

    async def _alive(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, request: Request) -> Response:
        engines = self._find_engines()
        if not engines:
            return _unready(LOADING)
        # One probe at a time: requests that come meanwhile share its result.
        old = self._probe is not None and self._probe.done()
        if self._probe is None or (old and time.monotonic() - self._ended > FRESH_SECONDS):
            self._probe = asyncio.create_task(self._ask_for_tokens(engines))
        if await asyncio.shield(self._probe):
            return PlainTextResponse("ready\n")
        return _unready(next((e.fault for e in engines if e.fault), NO_TOKEN))

    async def _ask_for_tokens(self, engines: Sequence[AnyEngine]) -> bool:
        try:
            return all(await asyncio.gather(*map(self._ask_for_token, engines)))
        finally:
            self._ended = time.monotonic()

    async def _ask_for_token(self, engine: AnyEngine) -> bool:
        """True if any request gets a token: when the engine is full, the probe itself waits."""
        before = engine.totals.tokens
        try:
            answered = await run_in_threadpool(engine.health, self._probe_seconds)
        except Exception:
            log.exception("the probe of %s failed", engine.model.config.name)
            return False
        return answered or engine.totals.tokens > before


def _unready(sentence: str) -> Response:
    return PlainTextResponse(sentence + "\n", 503, {"Retry-After": "5"})
