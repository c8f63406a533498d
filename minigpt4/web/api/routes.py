"""POST /v1/chat/completions and GET /v1/models, as OpenAI's clients expect them, and described."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from minigpt4.conversation import Answer
from minigpt4.engine import Engine, explain
from minigpt4.errors import UserError
from minigpt4.web.api import openapi
from minigpt4.web.api.asking import Asking
from minigpt4.web.api.chat_reply import Reply
from minigpt4.web.api.chat_request import parse, read_json
from minigpt4.web.api.errors import error_response, failure, json_response
from minigpt4.web.api.keys import Keys

BODY_SECONDS = 120  # to send a request
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
BESIDE_PICTURES = 2**20  # bytes of a request for its text

log = logging.getLogger(__name__)


class Api:
    """The endpoints under /v1.

    max_picture_bytes bounds a request's body: one such picture in base64 and a megabyte of text.
    responses: how many there were, by endpoint and status.
    """

    def __init__(self, asking: Asking, keys: Keys, max_picture_bytes: int) -> None:
        self._asking, self._keys = asking, keys
        self._max_body = max_picture_bytes * 4 // 3 + BESIDE_PICTURES
        self._started = int(time.time())
        self.responses: Counter[tuple[str, int]] = Counter()
        # Routes, not a mounted application: that one would not know its own paths behind a proxy
        # that takes --root-path away before it asks here.
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
                response = Response(status_code=499)  # nobody reads it
            except HTTPException as error:
                response = self._refusal(error)
            except UserError as error:
                response = failure(error)
            except Exception as error:
                log.exception("while answering a program")
                response = failure(explain(error))
            self.responses[name, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=methods)

    def _refusal(self, error: HTTPException) -> Response:
        codes = {401: "invalid_api_key", 404: "model_not_found", 413: "request_too_large"}
        return error_response(
            error.status_code, error.detail, codes.get(error.status_code), error.headers
        )

    async def _other(self, request: Request) -> Response:
        """No endpoint, or not with this method."""
        path = request.path_params.get("other", "")
        method = "POST" if path == "chat/completions" else "GET"
        if path == "chat/completions" or path.partition("/")[0] in ("models", "openapi.json"):
            sentence = f"This endpoint takes {method} only."
            return error_response(405, sentence, "wrong_method", {"Allow": method})
        sentence = "There is no such endpoint: /v1/openapi.json describes those that there are."
        return error_response(404, sentence, "unknown_endpoint")

    async def _openapi(self, request: Request) -> Response:
        return json_response(openapi.description())

    # --- models --------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described(self._asking.engine)]})

    async def _model(self, request: Request) -> Response:
        engine = self._asking.engine
        _check_model(request.path_params["name"], engine)
        return json_response(self._described(engine))

    def _described(self, engine: Engine) -> dict:
        return {
            "id": engine.model.config.name,
            "object": "model",
            "created": self._started,
            "owned_by": "minigpt4",
        }

    # --- chat/completions ----------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        engine = self._asking.engine
        body = await self._body(request)
        asked = parse(await run_in_threadpool(read_json, body), engine.model.config)
        if asked.model is not None:
            _check_model(asked.model, engine)
        answer = await self._asking.ask(asked)
        reply = Reply(engine, answer, asked.logprobs, asked.include_usage)
        stream = asked.stream
        del body, asked  # tens of megabytes, perhaps, that the answer does not need
        if stream:
            return _Events(reply.events(), answer)
        gone = asyncio.create_task(_close_when_gone(request, answer))
        try:
            async for _ in answer:
                pass
        finally:
            gone.cancel()
            answer.close()
        if answer.stop_reason == "closed":
            raise ClientDisconnect
        return json_response(reply.whole())

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        too_large = HTTPException(
            413, f"The request is larger than {self._max_body / 2**20:.0f} MB: scale pictures down."
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._max_body:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, "The request took too long to arrive.") from None
        return bytes(body)


class _Events(StreamingResponse):
    """Server-sent events of an answer, which ends when nobody listens any more."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:  # also where it never began
            self._answer.close()


async def _close_when_gone(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.close()


def _check_model(name: str, engine: Engine) -> None:
    known = engine.model.config.name
    if name != known:
        raise HTTPException(404, f"There is no such model here: there is “{known}”.")
