"""Access to the API: the key, and the size and time of a request's body."""

import asyncio
import hmac
import re
from collections.abc import Sequence

import httpx
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from minigpt4.errors import UserError
from minigpt4.web.api.errors import ApiError, quotable
from minigpt4.web.guard.limits import read_rest, request_bytes

BODY_SECONDS = 120  # the time that a client has to send a request
THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


class Keys:
    """Decides who may use the API and read the metrics.

    key: programs must send it. "" lets everybody in, unless the page has a password: then the API
    is closed until it has a key, because it would be a way around the password.
    """

    def __init__(self, key: str = "", page_has_password: bool = False) -> None:
        self._key = key.encode()
        self._closed = page_has_password and not key

    def check(self, request: Request) -> None:
        """Raises ApiError 401 without the key."""
        if self._closed:
            raise self._unauthorized("The API is closed: its operator must set an API key.")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time, so that the time taken tells nothing about the key.
        matches = hmac.compare_digest(given.strip(" \t").encode("latin-1"), self._key)
        if self._key and not (matches and scheme.lower() == "bearer"):
            sentence = "The API key is missing or wrong: send “Authorization: Bearer KEY”."
            raise self._unauthorized(sentence)

    @staticmethod
    def _unauthorized(sentence: str) -> ApiError:
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(sentence, 401, "invalid_api_key", headers=headers)


class Cors(CORSMiddleware):
    """CORS whose refusals say who can allow the request. It also refuses foreign pages' requests
    that browsers send without a preflight: such a page could not read the answer, but have it
    generated."""

    async def simple_response(
        self, scope: Scope, receive: Receive, send: Send, request_headers: Headers
    ) -> None:
        origin = request_headers.get("origin")
        own = origin and origin.partition("://")[2] == request_headers.get("host")
        kind = request_headers.get("content-type", "").partition(";")[0].strip().lower()
        asked = scope["method"] != "POST" or kind == "application/json"
        if not origin or own or asked or self.is_allowed_origin(origin):
            await super().simple_response(scope, receive, send, request_headers)
        else:
            await read_rest(Request(scope, receive))
            await ApiError(_foreign(origin), 403).response(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin = request_headers["origin"]
        sentence = "Web pages may only send GET and POST: use these.\n"
        if not self.is_allowed_origin(origin):
            sentence = _foreign(origin) + "\n"
        headers = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
        return PlainTextResponse(sentence, response.status_code, headers)


def _foreign(origin: str) -> str:
    return (
        f"Web pages of {quotable(origin, 200)} may not use this server: its operator can allow "
        "them with --cors-origins."
    )


def cors(origins: str | None, headers: Sequence[str] = ()) -> Middleware:
    """Lets scripts of web pages from these origins use the API, if they have the key.

    origins: as in --cors-origins, None for those of this machine; headers: the answers' headers
    that scripts may read.
    """
    named = [_origin(origin.strip()) for origin in (origins or "").split(",") if origin.strip()]
    return Middleware(
        Cors,
        allow_origins=named,
        allow_origin_regex=None if named else THIS_MACHINE,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[*headers, "Retry-After"],
        allow_private_network=True,
    )


def _origin(text: str) -> str:
    """An origin as browsers send it: in lower case, without the default port. Applications' origins
    have schemes of their own, such as app://obsidian.md; that of files is null."""
    if text in ("*", "null"):
        return text
    try:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@*]+/?", text.lower()):
            raise httpx.InvalidURL(text)
        address = httpx.URL(text.lower())
    except httpx.InvalidURL:
        raise UserError(
            f"--cors-origins names “{text}”, which is not an origin: give each in full, without "
            "a path, such as https://chat.example.org."
        ) from None
    return f"{address.scheme}://{address.netloc.decode('ascii')}"


async def read_body(request: Request, max_picture_bytes: int) -> bytearray:
    """The whole body, of at most `request_bytes`.

    ApiError 413 if it is larger, 408 if it takes more than `BODY_SECONDS`, 400 if it is compressed.
    """
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ApiError("The body is compressed: send plain JSON, without Content-Encoding.")
    limit = request_bytes(max_picture_bytes)
    sentence = f"The request is larger than {limit / 2**20:.1f} MB: scale pictures down."
    too_large = ApiError(sentence, 413, "request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError("The request took too long to arrive: send it again.", 408) from None
    return body
