"""Limits on every request, including the page's own: its size, its time, its address.

Gradio limits uploaded files, but no other body, and has routes that this page does not need: one
starts another program, one writes conversations to the disk.
"""

import asyncio
import contextlib
import re

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.errors import DISK_FULL

FILES_AT_ONCE = 16  # pictures of one upload, or of one conversation
TEXT_BYTES = 16 * 2**20  # the page's largest request: a conversation with small pictures
MCP_PICTURE_BYTES = 5 * 2**20
BODY_SECONDS = 120.0
# How long, and how much, to read on after a body was refused: closing a connection with unread
# bytes resets it, and the client loses the answer.
REST_SECONDS, REST_BYTES = 1.0, 64 * 2**20
_AUTHORITY = "(?i)^https?://[^/]*"
# The first part of gradio's paths, after /gradio_api.
CLOSED = {
    "component_server",
    "custom_component",
    "deep_link",
    "dev",
    "monitoring",
    "process_recording",
    "run-history",
    "runs",
    "stream",
    "undo-vibe-edit",
    "vibe-code",
    "vibe-edit",
}


class Limits:
    """ASGI middleware. max_bytes: the largest picture file.

    A body that is too large gets 413, one that takes too long 408, one that finds no room on the
    disk 507, and a closed route 404. /v1 limits its own bodies, and answers with OpenAI's errors.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # this server has none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):
            # A full address, as sent to a proxy: a server must accept it, too (RFC 9112, 3.2.2).
            scope["path"] = re.sub(_AUTHORITY, "", scope["path"]) or "/"
            raw_path = scope.get("raw_path") or b""
            scope["raw_path"] = re.sub(_AUTHORITY.encode(), b"", raw_path) or None
        parts = parts_of(scope)
        if closed(parts):
            await PlainTextResponse("There is no such page.\n", 404)(scope, receive, send)
        elif parts[:1] == ("v1",):
            await self._app(scope, receive, send)
        else:
            upload = parts[:2] == ("gradio_api", "upload")
            limit = FILES_AT_ONCE * self._max_bytes + 2**20 if upload else TEXT_BYTES
            if parts[:2] == ("gradio_api", "mcp"):
                limit = mcp_bytes(self._max_bytes)
            await _BoundedRequest(scope, receive, send, limit, self._seconds).run(self._app)


def closed(parts: tuple[str, ...]) -> bool:
    """Is this one of Gradio's routes that the page does not need?"""
    inner = parts[1:] if parts[:1] == ("gradio_api",) else parts
    return bool(inner) and (inner[0] in CLOSED or inner[0].startswith("proxy="))


def request_bytes(max_picture_bytes: int) -> int:
    """The largest body of a program's request: one such picture in base64, a megabyte of text."""
    return max_picture_bytes * 4 // 3 + 2**20


def mcp_bytes(max_picture_bytes: int) -> int:
    """The largest body for the MCP tool. Its package reads bodies on the event loop: 27 MB would
    delay everybody's answers for half a second."""
    return request_bytes(min(max_picture_bytes, MCP_PICTURE_BYTES))


def inner_path(scope: Scope) -> str:
    """The path without --root-path, which a proxy may or may not have removed."""
    path, prefix = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if f"{path}/".startswith(f"{prefix}/") else path


def parts_of(scope: Scope) -> tuple[str, ...]:
    """The parts of the `inner_path` between slashes."""
    return tuple(part for part in inner_path(scope).split("/") if part)


def waits(scope: Scope) -> bool:
    """Does the client send its body only when it is asked to, as curl does with a large one?"""
    return any(name == b"expect" for name, _ in scope["headers"])


async def read_rest(request: Request, most: int = REST_BYTES) -> None:
    """Read the rest of a refused body, up to about `most` bytes: see REST_SECONDS."""
    # RuntimeError: all of it has been read.
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(REST_SECONDS):
            async for part in request.stream():
                most -= len(part)
                if most < 0:
                    return


class _BoundedRequest:
    """One request, whose body may have at most `limit` bytes and take at most `seconds`."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limit: int, seconds: float
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._limit, self._end = limit, asyncio.get_running_loop().time() + seconds
        self._read = 0
        self._complete = scope["method"] in ("GET", "HEAD")  # their bodies are never read
        self._answered = False
        self._refusal: Response | None = None

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer, or refuse the request."""
        length = dict(self._scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            self._refusal = self._too_large()
        else:
            await self._ask(app)
        if self._refusal is not None and not self._answered:
            await self._read_rest(self._limit + REST_BYTES)
            self._refusal.headers["connection"] = "close"  # the rest of the body is not read
            await self._refusal(self._scope, self._receive, self._send)

    async def _ask(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._bounded_receive, self._bounded_send)
        except ClientDisconnect:  # it went away, or the body was refused
            pass
        except Exception as error:
            if self._answered and isinstance(error.__cause__, HTTPException):
                # Gradio's stream has already said why it ends: not a fault of this program.
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            elif isinstance(error, OSError) and error.errno in DISK_FULL and not self._answered:
                self._refusal = PlainTextResponse("The server's disk is full: try later.\n", 507)
            elif self._refusal is None:
                raise

    async def _bounded_receive(self) -> Message:
        if self._complete:  # the next message is that the client has gone
            return await self._receive()
        if self._refusal is None:
            try:
                async with asyncio.timeout_at(self._end):
                    message = await self._counted()
                if self._read <= self._limit:
                    return message
                self._refusal = self._too_large()
            except TimeoutError:
                sentence = "The request took too long to arrive: send it again.\n"
                self._refusal = PlainTextResponse(sentence, 408)
        self._complete = False
        return {"type": "http.disconnect"}  # so that the reader of the body gives up

    async def _bounded_send(self, message: Message) -> None:
        if self._refusal is None or self._answered:
            if not self._answered:
                await self._read_rest(self._limit)
            self._answered = True
            await self._send(message)

    async def _read_rest(self, most: int) -> None:
        """Read the rest, up to `most` bytes in all, unless the client still waits to be asked."""
        if not self._complete and (self._read or not waits(self._scope)):
            await read_rest(Request(self._scope, self._counted), most - self._read)

    async def _counted(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> Response:
        sentence = f"The request is larger than {self._limit / 2**20:.0f} MB: send less.\n"
        return PlainTextResponse(sentence, 413, {"connection": "close"})
