"""All parts of Gradio (and Uvicorn) that this project replaces, each with the reason.

Gradio has no option for any of these. `apply` and the functions after it replace them. A test
checks that the installed Gradio still has each attribute, and further tests that each patch works.
Patches that are needed while Gradio is imported are in `minigpt4.web`.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import fastapi.routing
import gradio as gr
import gradio.blocks
import gradio.queueing
import gradio.routes
import gradio.state_holder
import httpx
from gradio import networking, processing_utils, utils
from gradio.blocks import BlocksConfig
from gradio.exceptions import InvalidPathError
from gradio.mcp import GradioMCPServer
from gradio.queueing import Queue
from gradio.route_utils import CustomCORSMiddleware
from gradio.server_messages import ProcessCompletedMessage
from jinja2 import FunctionLoader
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from minigpt4.data.files import replace_surrogates
from minigpt4.web.guard.limits import parts_of

IDLE_POLL_SECONDS = 0.05  # between two looks at an empty queue; a pushed event ends the wait
PROGRESS_POLL_SECONDS = 0.1  # the page has no progress bars
# Seconds that a connection waits for its next request. Longer than a proxy keeps it open (nginx:
# 60); otherwise a question that is sent just when the server closes the connection would be lost.
KEEP_ALIVE_SECONDS = 75
MAX_UNREAD_EVENTS = 32  # events of one page that has not read their ends yet
# Within this time after the end of a page's last event, the page closes the stream of its events.
CLOSING_SECONDS = 0.2
MAX_SESSIONS = 10_000  # for which the time of the last event's end is kept
TOO_MANY = "This page has sent too many requests without reading the answers: load it again."
TOO_DEEP = "The request is nested too deeply."
TOO_MANY_VALUES = "The list in `data` must have at most {count} values."
NO_MORE_FILES = (
    "No further connection is accepted, since too many files are open: raise the limit (ulimit -n)."
)
# Who logs them, and how the lines begin about what MCP clients do wrong.
MCP_LOGGERS = ("", "mcp.server.lowlevel.server", "mcp.server.transport_security")
MISTAKES = (
    *("Failed to validate ", "Received exception from stream", "Response ID "),
    *("Tool '%s' not listed", "Missing Content-Type", "Invalid Content-Type"),
)
NOT_UPLOADED = "Upload the file to /gradio_api/upload first, and send the path that this returns."


class Prepared(list):
    """Messages for gr.Chatbot, as dicts for the browser, which Gradio passes on unchanged.

    Paths in `url` begin with a slash; `at` puts the page's address in front of them.
    """

    def at(self, root_url: str) -> "Prepared":
        """The same messages with full addresses; messages without a file are not copied."""
        return Prepared(_with_root(message, root_url) for message in self)


def _with_root(message: dict, root_url: str) -> dict:
    if all("file" not in part for part in message["content"]):
        return message
    content = [
        {**part, "file": {**part["file"], "url": root_url + part["file"]["url"]}}
        if "file" in part
        else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def apply() -> None:
    """Replace attributes of modules and classes. Further calls change nothing."""
    global _applied
    if _applied:
        return
    _applied = True
    # Gradio keeps events for ever for pages that do not read them, and fails on lone surrogates and
    # on deeply nested JSON. An event that comes just when the page closes the stream of its earlier
    # events is lost: the client opens no other stream.
    Queue.push = _push
    # Notes when a session's last event ended, which `_push` needs.
    Queue.send_message = _send_message
    # Gradio's answer to a path that is not an uploaded file's does not say what is wrong.
    gradio.queueing.error_payload = _error_payload
    # An event that is pushed must end the sleep of the queue's loop, or polling less often would
    # delay every answer.
    gradio.queueing.asyncio = _QueueAsyncio()
    # Gradio downloads any public address that a client names as an uploaded file, of any size.
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    # At every update, Gradio looks up all pictures of a conversation on disk, on the event loop.
    processing_utils.async_move_files_to_cache = _move_files_to_cache
    # Gradio lets every web page use a server that is not localhost, including its API.
    gradio.routes.CustomCORSMiddleware = PageCORS
    # Gradio walks through the whole conversation at every update.
    processing_utils.add_root_url = _add_root_url
    # Gradio makes every endpoint a tool, but /chat is for gradio_client.
    GradioMCPServer.get_tool_to_endpoint = _get_tool_to_endpoint
    # Gradio builds every message again at every update.
    gr.Chatbot.postprocess = _postprocess_chatbot
    # Gradio makes a new component and its JSON schema for each output that is skipped: 3 ms.
    gr.Blocks.postprocess_data = _postprocess_data
    # For deep links, which the page does not have, Gradio describes all components for each new
    # visitor (6 ms) and keeps what they last showed: most of what a full garbage collection visits.
    gradio.state_holder.copy = _config_of_session
    # A redirect from /healthz/ to /healthz lacks the path under which a proxy serves this server.
    fastapi.routing.RedirectResponse = _RedirectBeside  # type: ignore[misc]
    # Gradio calls its own server through the environment's proxies, which may not reach it.
    gradio.blocks.httpx = _DirectHttpx()
    networking.url_ok = _url_ok
    # Gradio imports matplotlib on the event loop at the first event (a second, 40 MB) and sets its
    # backend at every update.
    utils.MatplotlibBackendMananger = nullcontext
    logging.getLogger("uvicorn.error").addFilter(_is_worth_saying)
    # While no file can be opened, asyncio logs thousands of tracebacks a second.
    logging.getLogger("asyncio").addFilter(_SaysOnce())


def draw_first(html: str) -> None:
    """Put this into the page's <head>, so that it is drawn before Gradio's scripts are loaded."""

    # Gradio's own setting, `head`, works only with its scripts: until then the page is empty.
    def read(name: str) -> str:
        text, _, _ = _original_loader.get_source(gradio.routes.templates.env, name)
        return text.replace("</head>", f"{{% raw %}}{html}{{% endraw %}}</head>", 1)

    gradio.routes.templates.env.loader = FunctionLoader(read)


def tune_queue(page: gr.Blocks) -> None:
    """Change a page's queue, before the page is launched."""
    queue = page._queue
    # The queue looks for events every millisecond: 7 % of a core for nothing.
    queue.sleep_when_free = IDLE_POLL_SECONDS
    # The queue looks for progress bars every 10 ms.
    queue.progress_update_sleep_when_free = PROGRESS_POLL_SECONDS
    # After each event, the queue makes a pandas table of the last 10,000.
    queue.ANALYTICS_MAX_EVENTS = 1


def tune_mcp(max_bytes: int) -> None:
    """Allow requests to the MCP server of up to `max_bytes`; its package's limit is 4 MiB. Keep
    clients' mistakes out of the log.

    The attribute exists only with the package.
    """
    larger = partial(GradioMCPServer.StreamableHTTPSessionManager, max_request_body_size=max_bytes)
    GradioMCPServer.StreamableHTTPSessionManager = staticmethod(larger)
    # It logs what is wrong with a client's request, which the client is told.
    for name in MCP_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_clients_mistake)


def tune_server(page: gr.Blocks) -> None:
    """Change a launched page's server; connections read these settings when they are made."""
    config = page.server.config
    # Blocks.launch does not pass Uvicorn's option on.
    config.timeout_keep_alive = KEEP_ALIVE_SECONDS
    # Uvicorn keeps a connection for ever if no request, or only a part of its head, arrives.
    config.http_protocol_class = type("Punctual", (_Punctual, config.http_protocol_class), {})


_applied = False
_original_loader = gradio.routes.templates.env.loader
_original_push = Queue.push
_original_send_message = Queue.send_message
_ended: dict[str, float] = {}  # session -> when its last event ended
_original_move_files = processing_utils.async_move_files_to_cache
_original_add_root_url = processing_utils.add_root_url
_original_get_tool_to_endpoint = GradioMCPServer.get_tool_to_endpoint
_original_postprocess_chatbot = gr.Chatbot.postprocess
_original_postprocess_data = gr.Blocks.postprocess_data
_original_url_ok = networking.url_ok


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """False for Uvicorn's advice to install a library, which it gives whenever a client offers
    WebSockets or HTTP/2, and for an address that cannot be bound, which we report ourselves."""
    upgrade = str(record.msg).startswith(("Unsupported upgrade", "No supported WebSocket"))
    return not upgrade and not isinstance(record.msg, OSError)


def _is_no_clients_mistake(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MISTAKES)


class _Punctual:
    """Mixed into Uvicorn's protocol: closes a connection if the head of a request does not arrive
    within `KEEP_ALIVE_SECONDS` from its first byte, or from the connection's beginning."""

    cycle: Any
    transport: Any
    loop: asyncio.AbstractEventLoop
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)  # type: ignore[misc]
        self._stop_watching()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a head has arrived
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(KEEP_ALIVE_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _SaysOnce(logging.Filter):
    """While no connection can be accepted, replaces the event loop's tracebacks by one sentence a
    minute."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("socket.accept() out of system resource"):
            return True
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 60
        record.msg, record.args, record.exc_info = NO_MORE_FILES, (), None
        return True


class PageCORS(CustomCORSMiddleware):
    """Gradio's CORS, for the page only; the API has its own rule (--cors-origins)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and parts_of(scope)[:1] == ("v1",):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _DirectHttpx:
    """httpx as gradio.blocks sees it."""

    get = staticmethod(partial(httpx.get, trust_env=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(httpx, name)


class _RedirectBeside(RedirectResponse):
    """To the address asked for, with or without a slash at its end: relative to that, since a proxy
    may have changed all before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, query = scope["path"], scope["query_string"].decode("latin-1")
        if path.endswith("//"):  # from which clients do not all go up in the same way
            return await super().__call__(scope, receive, send)
        name = path.rstrip("/").rpartition("/")[2]
        there = f"../{name}" if path.endswith("/") else f"./{name}/"
        await RedirectResponse(f"{there}?{query}" if query else there)(scope, receive, send)


def _url_ok(url: str) -> bool:
    """Always true for the server's own address (http), which has just answered `get`. A public link
    may not answer yet."""
    return url.startswith("http://") or _original_url_ok(url)


# --- the queue ------------------------------------------------------------------------------------


class _QueueAsyncio:
    """asyncio as gradio.queueing sees it: its idle sleep ends as soon as an event is pushed."""

    def __init__(self) -> None:
        self._sleeping: dict[asyncio.AbstractEventLoop, set[asyncio.Future]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float, result: Any = None) -> Any:
        """Sleep. A sleep of IDLE_POLL_SECONDS ends early if `wake` is called in the same loop."""
        if delay != IDLE_POLL_SECONDS:
            return await asyncio.sleep(delay, result)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        timer = loop.call_later(delay, _finish, future)
        sleeping = self._sleeping.setdefault(loop, set())
        sleeping.add(future)
        try:
            await future
        finally:
            timer.cancel()
            sleeping.discard(future)
            if not sleeping:
                self._sleeping.pop(loop, None)
        return result

    def wake(self) -> None:
        """End the idle sleeps of the running loop."""
        for future in self._sleeping.get(asyncio.get_running_loop(), ()):
            _finish(future)


def _finish(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


async def _push(self: Queue, body: Any, **others: Any) -> tuple:
    """HTTPException 429 if the page does not read its events, 400 if its JSON is too deep."""
    if len(self.pending_event_ids_session.get(body.session_hash, ())) >= MAX_UNREAD_EVENTS:
        raise HTTPException(429, TOO_MANY)
    try:
        body.data, body.event_data = replace_surrogates([body.data, body.event_data])
    except RecursionError:
        raise HTTPException(400, TOO_DEEP) from None
    function = self.blocks.fns.get(body.fn_index)
    if body.simple_format and function:  # curl, for example: arguments at the end may be left out
        count = len(function.inputs)
        if len(body.data) > count:
            raise HTTPException(400, TOO_MANY_VALUES.format(count=count))
        body.data.extend([None] * (count - len(body.data)))
    await _until_closed(self, body.session_hash)
    pushed = await _original_push(self, body=body, **others)
    gradio.queueing.asyncio.wake()
    return pushed


async def _until_closed(queue: Queue, session: str) -> None:
    """If a session's event has just ended, wait until the page has closed its stream, unless
    another event keeps the stream open. Gradio ends it after the end of the last event."""
    ended = _ended.get(session, 0.0)
    while (left := ended + CLOSING_SECONDS - time.monotonic()) > 0:
        waiting = queue.pending_event_ids_session.get(session, ())
        if any(event in queue.event_ids_to_events for event in waiting):
            return
        await asyncio.sleep(min(left, 0.02))


def _send_message(self: Queue, event: Any, event_message: Any) -> None:
    """Gradio's method; also keeps the time at which a session's event ended."""
    _original_send_message(self, event, event_message)
    if isinstance(event_message, ProcessCompletedMessage):
        now = time.monotonic()
        if len(_ended) > MAX_SESSIONS:
            for session in [s for s, then in _ended.items() if then < now - CLOSING_SECONDS]:
                del _ended[session]
        _ended[event.session_hash] = now


def _error_payload(error: BaseException | None, show_error: bool) -> dict:
    if isinstance(error, InvalidPathError):
        error = gr.Error(NOT_UPLOADED)
    return utils.error_payload(error, show_error)


def _get_tool_to_endpoint(self: GradioMCPServer) -> dict[str, str]:
    tools = _original_get_tool_to_endpoint(self)
    return {name: endpoint for name, endpoint in tools.items() if endpoint != "/chat"}


# --- what the page shows --------------------------------------------------------------------------


async def _move_files_to_cache(data: Any, *arguments: Any, **options: Any) -> Any:
    if isinstance(data, Prepared):
        return data
    return await _original_move_files(data, *arguments, **options)


def _add_root_url(data: Any, root_url: str, previous_root_url: str | None) -> Any:
    if not isinstance(data, list) or not any(isinstance(part, Prepared) for part in data):
        return _original_add_root_url(data, root_url, previous_root_url)
    return [
        part.at(root_url)
        if isinstance(part, Prepared)
        else _original_add_root_url(part, root_url, previous_root_url)
        for part in data
    ]


def _postprocess_chatbot(self: gr.Chatbot, value: Any) -> Any:
    return value if isinstance(value, Prepared) else _original_postprocess_chatbot(self, value)


async def _postprocess_data(self: gr.Blocks, block_fn: Any, predictions: Any, state: Any) -> list:
    """Only outputs that are not skipped go through Gradio's own method."""
    outputs = list(block_fn.outputs)
    plain = not isinstance(predictions, Mapping) and not block_fn.batch
    if not plain or len(outputs) < 2 or len(predictions) != len(outputs):
        return await _original_postprocess_data(self, block_fn, predictions, state)
    kept = [i for i, value in enumerate(predictions) if not _is_skip(value)]
    if len(kept) == len(outputs):
        return await _original_postprocess_data(self, block_fn, predictions, state)
    results: list[Any] = [None if block.stateful else gr.skip() for block in outputs]
    if not kept:
        return results
    fewer = copy.copy(block_fn)
    fewer.outputs = [outputs[i] for i in kept]
    values = [predictions[i] for i in kept]
    found = await _original_postprocess_data(
        self, fewer, values[0] if len(values) == 1 else values, state
    )
    for i, value in zip(kept, found, strict=True):
        results[i] = value
    return results


def _is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value == {"__type__": "update"}


def _config_of_session(config: BlocksConfig) -> BlocksConfig:
    copied = copy.copy(config)
    copied.config_for_block = lambda *_: {}
    return copied


async def _fetch_nothing(url: str) -> NoReturn:
    raise gr.Error("Send the picture's file, not its address.", print_exception=False)
