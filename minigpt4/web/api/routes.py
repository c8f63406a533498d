"""The routes for programs: OpenAI's endpoints under /v1, health and metrics."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from minigpt4.conversation import Answer
from minigpt4.engine import AnyEngine, explain
from minigpt4.errors import UserError
from minigpt4.web.api import openapi
from minigpt4.web.api.access import Keys, cors, read_body
from minigpt4.web.api.body import parse_body, read_chat
from minigpt4.web.api.decisions import decide, read_decisions
from minigpt4.web.api.errors import ApiError, json_response
from minigpt4.web.api.health import Health
from minigpt4.web.api.metrics import Metrics
from minigpt4.web.api.not_found import nowhere, refuse
from minigpt4.web.api.openapi import DROPPED, IGNORED
from minigpt4.web.api.reply import CompletionReply
from minigpt4.web.api.responses import ResponseReply, read_response, renamed
from minigpt4.web.api.schemas import ChatRequest
from minigpt4.web.api.service import ChatService
from minigpt4.web.guard.image_url import ImageUrls
from minigpt4.web.guard.limits import read_rest, waits

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
# (JSON object, are tools ignored?) -> (the request, fields that are ignored).
Read = Callable[[dict, bool], tuple[ChatRequest, list[str]]]
T = TypeVar("T")
# A large request has more bytes than this; so many of them are read at once, before the queue.
LARGE, MOST_LARGE = 2**20, 16
CLIENT_GONE = 499  # nginx's status for a client that closed the connection

log = logging.getLogger(__name__)


def endpoints(
    service: ChatService, keys: Keys, max_picture_bytes: int, cors_origins: str | None = None
) -> list[BaseRoute]:
    """All routes for programs. They come before the page's own, if there is one."""
    api = Api(service, keys, max_picture_bytes, cors(cors_origins, (IGNORED, DROPPED)))
    metrics = Metrics(service.find_engines, api.responses, keys)
    return [*api.routes, *Health(service.find_engines).routes, *metrics.routes]


def application(
    engine: AnyEngine,
    api_key: str = "",
    image_hosts: str = "",
    max_upload_mb: int = 20,
    ignore_tools: bool = False,
) -> Starlette:
    """The endpoints alone, without a page."""
    max_bytes = max_upload_mb * 2**20
    image_urls = ImageUrls(image_hosts.split(","), max_bytes)
    service = ChatService(lambda: [engine], image_urls, ignore_tools)
    routes = endpoints(service, Keys(api_key), max_bytes)
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


class Api:
    """The endpoints under /v1.

    responses: their number by endpoint and status.
    """

    def __init__(
        self, service: ChatService, keys: Keys, max_picture_bytes: int, cors: Middleware
    ) -> None:
        self._service, self._keys, self._cors = service, keys, cors
        self._max_picture_bytes = max_picture_bytes
        self._started = int(time.time())
        self._large = 0  # requests that are being read or opened
        self.responses: Counter[tuple[str, int]] = Counter()
        # Routes, not a mounted application, which would not recognise its own paths behind a proxy
        # that strips --root-path.
        self.routes = [
            self._route("/v1/chat/completions", self._complete, ["POST"]),
            self._route("/v1/responses", self._respond, ["POST"]),
            self._route("/v1/decisions", self._decide, ["POST"]),
            self._route("/v1/models", self._models, ["GET"]),
            self._route("/v1/models/{name:path}", self._model, ["GET"]),
            self._route("/v1/openapi.json", self._openapi, ["GET"]),
            self._route("/openapi.json", self._openapi, ["GET"]),  # where many programs look
            self._route("/v1/{other:path}", self._other, METHODS),
            self._route("/v1", self._other, METHODS),
        ]

    def _route(
        self, path: str, handle: Callable[[Request], Awaitable[Response]], methods: list[str]
    ) -> Route:
        """A route on which every error becomes OpenAI's error object."""
        name = path.partition("/{")[0]

        async def endpoint(request: Request) -> Response:
            try:
                self._keys.check(request)
                response = await handle(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            except UserError as error:
                if not waits(request.scope):
                    await read_rest(request)
                response = ApiError.of(error).response
            except Exception as error:
                log.exception("A program's request failed.")
                response = ApiError.of(explain(error)).response
            self.responses[name, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=methods, middleware=[self._cors])

    async def _other(self, request: Request) -> Response:
        """An unknown endpoint, or a wrong method."""
        path = request.path_params.get("other", "")
        raise nowhere(f"/v1/{path}", request.method)

    async def _openapi(self, request: Request) -> Response:
        described = await run_in_threadpool(openapi.description)
        path = request.scope.get("root_path")
        return json_response(described | ({"servers": [{"url": path}]} if path else {}))

    async def _models(self, request: Request) -> Response:
        described = [self._describe(engine) for engine in self._service.engines]
        return json_response({"object": "list", "data": described})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"].strip("/")
        if not name:
            raise nowhere("/v1/models/", request.method)
        engine = self._service.engine(name, otherwise="")
        return json_response(self._describe(engine))

    def _describe(self, engine: AnyEngine) -> dict:
        return {
            "id": engine.model.config.name,
            "object": "model",
            "created": self._started,
            "owned_by": "minigpt4",
            "max_model_len": engine.model.config.context,  # vLLM's name
            "context_length": engine.model.config.context,  # OpenRouter's name, as the next
            "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
        }

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, read_chat, CompletionReply)

    async def _respond(self, request: Request) -> Response:
        try:
            return await self._answer(request, read_response, ResponseReply)
        except UserError as error:
            raise renamed(ApiError.of(error)) from None

    @contextmanager
    def _room(self, request: Request) -> Iterator[None]:
        """Reserves room to read the request and open its pictures. ApiError 429 before the body is
        read if many large ones are being read, or if the only engine is full."""
        engine = self._service.engine()
        if len(self._service.engines) == 1:
            engine.refuse_if_full()
        length = request.headers.get("content-length", "")
        large = not length.isdecimal() or int(length) > LARGE
        if large and self._large >= MOST_LARGE:
            sentence = "Too many large requests at once: try again in a moment."
            raise ApiError.of(UserError(sentence, "queue_full"))
        self._large += large
        try:
            yield
        finally:
            self._large -= large

    async def _decide(self, request: Request) -> Response:
        try:
            with self._room(request):
                body = await read_body(request, self._max_picture_bytes)
                asked = await run_in_threadpool(_read, read_decisions, body)
                engine = self._service.engine(asked.about.model)
                engine.refuse_if_full()
                conversation = await self._service.conversation(asked.about)
            decided = await _unless_gone(request, decide(engine, conversation, asked))
            return json_response(decided, headers=_headers(asked.ignored, 0))
        except UserError as error:
            raise renamed(ApiError.of(error)) from None

    async def _answer(
        self, request: Request, read: Read, make_reply: type[CompletionReply] | type[ResponseReply]
    ) -> Response:
        with self._room(request):
            body = await read_body(request, self._max_picture_bytes)
            # In a thread: JSON of up to 28 MB takes long.
            tools = self._service.ignore_tools
            asked, ignored = await run_in_threadpool(_read, read, body, tools)
            del body
            engine = self._service.engine(asked.model)
            answers = await self._service.ask(asked)
        reply = make_reply(engine, answers, asked)
        headers = _headers(ignored, answers[0].dropped_turns)
        stream = asked.stream
        del asked  # perhaps tens of megabytes, which the answer does not need
        if stream:
            return _Events(reply.events(), answers, headers)
        try:
            await _unless_gone(request, _read_all(answers))
        finally:
            _close(answers)
        if any(answer.stop_reason == "closed" for answer in answers):
            raise ClientDisconnect
        return json_response(reply.whole(), headers=headers)


class _Events(StreamingResponse):
    """Server-sent events about answers, which end when the client goes away."""

    def __init__(
        self, events: AsyncIterator[bytes], answers: Sequence[Answer], headers: Mapping[str, str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:  # even if the response never began
            _close(self._answers)


def _read(read: Callable[..., T], body: bytearray, *settings: bool) -> T:
    return read(parse_body(body), *settings)


def _headers(ignored: Sequence[str], dropped_turns: int) -> dict[str, str]:
    """The headers that tell a program about ignored fields and dropped turns."""
    headers = {}
    if ignored:
        headers[IGNORED] = ", ".join(ignored).encode("ascii", "replace").decode()
    if dropped_turns:
        headers[DROPPED] = str(dropped_turns)
    return headers


async def _read_all(answers: Sequence[Answer]) -> None:
    for answer in answers:
        async for _ in answer:
            pass


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. If the client goes away before, the work ends, with ClientDisconnect."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def _close(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.close()
