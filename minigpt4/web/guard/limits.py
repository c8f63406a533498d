"""What every request must keep to, the page's own among them: its size, its time, its address.

Gradio bounds the files of an upload, but no other body, and offers things that this page has no
use for: one starts another program, one writes conversations to the disk.
"""

import asyncio
import contextlib
import errno

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FILES_AT_ONCE = 16  # a conversation may hold as many pictures
TEXT_BYTES = 16 * 2**20  # of what the page sends: a conversation with small pictures, at most
BODY_SECONDS = 120.0
REST_SECONDS = 1.0  # for a refused body to arrive all the same
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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

    A body that is too large gets 413, one that takes too long 408, a closed address 404, one that
    the disk has no room for 507. /v1 bounds its own bodies, and answers as OpenAI does.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts = _parts(scope)
        if closed(parts):
            await PlainTextResponse("There is nothing here.\n", 404)(scope, receive, send)
        elif parts[:1] == ("v1",):
            await self._app(scope, receive, send)
        else:
            upload = parts[:2] == ("gradio_api", "upload")
            most = FILES_AT_ONCE * self._max_bytes + 2**20 if upload else TEXT_BYTES
            await _Bounded(self._app, most, self._seconds)(scope, receive, send)


def closed(parts: tuple[str, ...]) -> bool:
    """Is this one of gradio's addresses that the page does not need?"""
    inner = parts[1:] if parts[:1] == ("gradio_api",) else parts
    return bool(inner) and (inner[0] in CLOSED or inner[0].startswith("proxy="))


def _parts(scope: Scope) -> tuple[str, ...]:
    """The path's parts, without what a proxy may have left in front."""
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    return tuple(part for part in path.split("/") if part)


class _Bounded:
    """One request, whose body may have so many bytes and take so many seconds."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds
        self._refusal: Response | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            await self._too_large()(scope, receive, send)
            return
        loop, read, answered = asyncio.get_running_loop(), 0, False
        whole = scope["method"] in ("GET", "HEAD")  # nobody reads the body of these
        end = loop.time() + self._seconds

        async def bounded_receive() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is that the client goes away
                return await receive()
            if self._refusal is None:
                try:
                    async with asyncio.timeout_at(end):
                        message = await receive()
                    read += len(message.get("body", b""))
                    whole = not message.get("more_body", False)
                    if read <= self._most:
                        return message
                    self._refusal = self._too_large()
                except TimeoutError:
                    self._refusal = PlainTextResponse("The request took too long to arrive.\n", 408)
            whole = False
            return {"type": "http.disconnect"}  # whoever reads the body gives up

        async def read_rest() -> None:
            """A connection that is closed over unread bytes is reset: the client would lose the
            answer."""
            nonlocal read, whole
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REST_SECONDS):
                    while not whole and read <= self._most:
                        message = await receive()
                        read += len(message.get("body", b""))
                        whole = not message.get("more_body", False)

        async def bounded_send(message: Message) -> None:
            nonlocal answered
            if self._refusal is None or answered:
                if not answered:
                    await read_rest()
                answered = True
                await send(message)

        try:
            await self._app(scope, bounded_receive, bounded_send)
        except ClientDisconnect:  # it went away, or is sent away
            pass
        except Exception as error:
            if answered and isinstance(error.__cause__, HTTPException):
                # A stream of gradio's that has said why it ends: not a fault of this program.
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif isinstance(error, OSError) and error.errno in FULL and not answered:
                self._refusal = PlainTextResponse("The server's disk is full: try later.\n", 507)
            elif self._refusal is None:
                raise
        if self._refusal is not None and not answered:
            self._refusal.headers["connection"] = "close"  # the rest of the body is not read
            await self._refusal(scope, receive, send)

    def _too_large(self) -> Response:
        sentence = f"The request is larger than {self._most / 2**20:.0f} MB.\n"
        return PlainTextResponse(sentence, 413, {"connection": "close"})
