"""The routes for programs: OpenAI's endpoints under /v1, health and metrics."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from minigpt4.conversation import Answer
from minigpt4.engine import AnyEngine, explain
from minigpt4.errors import UserError
from minigpt4.web.api import openapi
from minigpt4.web.api.access import Keys, read_body
from minigpt4.web.api.errors import ApiError, json_response
from minigpt4.web.api.health import Health
from minigpt4.web.api.metrics import Metrics
from minigpt4.web.api.reply import ChatService, CompletionReply
from minigpt4.web.api.schemas import ChatRequest, parse, read_json
from minigpt4.web.guard.image_url import ImageUrls

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
CLIENT_GONE = 499  # nginx's status for a client that closed the connection

log = logging.getLogger(__name__)


def endpoints(service: ChatService, keys: Keys, max_picture_bytes: int) -> list[BaseRoute]:
    """Everything programs may ask. These routes come before the page's own, if there is one."""
    api = Api(service, keys, max_picture_bytes)
    metrics = Metrics(service.find_engine, api.responses, keys)
    return [*api.routes, *Health(service.find_engine).routes, *metrics.routes]


def application(
    engine: AnyEngine, api_key: str = "", image_hosts: str = "", max_upload_mb: int = 20
) -> Starlette:
    """The endpoints alone, without a page."""
    max_bytes = max_upload_mb * 2**20
    service = ChatService(lambda: engine, ImageUrls(image_hosts.split(","), max_bytes))
    return Starlette(routes=endpoints(service, Keys(api_key), max_bytes))


class Api:
    """The endpoints under /v1.

    responses: how many there were, by endpoint and status.
    """

    def __init__(self, service: ChatService, keys: Keys, max_picture_bytes: int) -> None:
        self._service, self._keys = service, keys
        self._max_picture_bytes = max_picture_bytes
        self._started = int(time.time())
        self.responses: Counter[tuple[str, int]] = Counter()
        # Routes, not a mounted application: a mounted one would not recognise its own paths behind
        # a proxy that strips --root-path.
        self.routes = [
            self._route("/v1/chat/completions", self._complete, ["POST"]),
            self._route("/v1/models", self._models, ["GET"]),
            self._route("/v1/models/{name:path}", self._model, ["GET"]),
            self._route("/v1/openapi.json", self._openapi, ["GET"]),
            self._route("/v1/{other:path}", self._other, METHODS),
            self._route("/v1", self._other, METHODS),
        ]

    def _route(
        self, path: str, handle: Callable[[Request], Awaitable[Response]], methods: list[str]
    ) -> Route:
        """Whatever goes wrong becomes OpenAI's error object."""
        name = path.partition("/{")[0]

        async def endpoint(request: Request) -> Response:
            try:
                self._keys.check(request)
                response = await handle(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            except UserError as error:
                response = ApiError.of(error).response
            except Exception as error:
                log.exception("A program's request failed.")
                response = ApiError.of(explain(error)).response
            self.responses[name, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=methods)

    async def _other(self, request: Request) -> Response:
        """No endpoint, or not with this method."""
        path = request.path_params.get("other", "")
        method = "POST" if path == "chat/completions" else "GET"
        if path == "chat/completions" or path.partition("/")[0] in ("models", "openapi.json"):
            sentence = f"This endpoint takes {method} only: use that method."
            raise ApiError(sentence, 405, "wrong_method", headers={"Allow": method})
        sentence = "There is no such endpoint: /v1/openapi.json lists those that exist."
        raise ApiError(sentence, 404, "unknown_endpoint")

    async def _openapi(self, request: Request) -> Response:
        return json_response(await run_in_threadpool(openapi.description))

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._describe(self._service.engine)]})

    async def _model(self, request: Request) -> Response:
        engine = self._service.engine
        _check_model(request.path_params["name"], engine)
        return json_response(self._describe(engine))

    def _describe(self, engine: AnyEngine) -> dict:
        return {
            "id": engine.model.config.name,
            "object": "model",
            "created": self._started,
            "owned_by": "minigpt4",
        }

    async def _complete(self, request: Request) -> Response:
        engine = self._service.engine
        body = await read_body(request, self._max_picture_bytes)
        asked = await run_in_threadpool(_read_request, body)  # JSON of up to 28 MB takes its time
        if asked.model is not None:
            _check_model(asked.model, engine)
        answer = await self._service.ask(asked)
        reply = CompletionReply(engine, answer, bool(asked.logprobs), asked.include_usage)
        stream = asked.stream
        del body, asked  # perhaps tens of megabytes, which the answer does not need
        if stream:
            return _Events(reply.events(), answer)
        watch = asyncio.create_task(_close_when_gone(request, answer))
        try:
            async for _ in answer:
                pass
        finally:
            watch.cancel()
            answer.close()
        if answer.stop_reason == "closed":
            raise ClientDisconnect
        return json_response(reply.whole())


class _Events(StreamingResponse):
    """An answer's server-sent events. The answer ends when the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:  # even where it never began
            self._answer.close()


def _read_request(body: bytearray) -> ChatRequest:
    return parse(read_json(body))


async def _close_when_gone(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.close()


def _check_model(name: str, engine: AnyEngine) -> None:
    served = engine.model.config.name
    if name != served:
        sentence = f"There is no such model here: ask for “{served}”, or leave model out."
        raise ApiError(sentence, 404, "model_not_found", "model")
