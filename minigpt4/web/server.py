"""The page's server: start, endpoints for programs on the same port, graceful shutdown."""

import argparse
import html
import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import gradio as gr
import httpx
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from minigpt4.engine import AnyEngine
from minigpt4.engine.stream import LOST, failure
from minigpt4.errors import UserError, say
from minigpt4.web.api.access import Keys
from minigpt4.web.api.mcp import McpGate, check_package
from minigpt4.web.api.not_found import refuse
from minigpt4.web.api.routes import endpoints
from minigpt4.web.api.service import ChatService
from minigpt4.web.guard import gradio_patches
from minigpt4.web.guard.compression import Compression
from minigpt4.web.guard.image_url import ImageUrls
from minigpt4.web.guard.limits import Limits, mcp_bytes
from minigpt4.web.guard.uploads import sweeping
from minigpt4.web.page.examples import in_folder

ENDING = (signal.SIGTERM, signal.SIGINT)
FLUSH_SECONDS = 0.5  # for the end of the last answers to reach the page

log = logging.getLogger(__name__)


def start_server(
    page: gr.Blocks, options: argparse.Namespace, first: str = "", **settings: Any
) -> str:
    """Serve the page in the background and return its address.

    first: HTML for its <head> that is drawn before its scripts are loaded. settings: further
    arguments of `Blocks.launch`. UserError if options.host or options.port cannot be used.
    """
    gradio_patches.apply()
    gradio_patches.draw_first(first)
    gradio_patches.tune_queue(page)
    host = options.host.strip().removeprefix("[").removesuffix("]")
    try:
        socket.getaddrinfo(host, options.port)
    except (OSError, UnicodeError):
        raise UserError(f"There is no address “{options.host}”: check --host.") from None
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # Gradio puts it into a URL
            server_port=options.port,
            footer_links=[],
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            **settings,
        )
    except (OSError, OverflowError):
        raise UserError(
            f"Port {options.port} of {options.host} is in use or not available: choose another "
            "with --port or --host."
        ) from None
    gradio_patches.tune_server(page)
    return address.rstrip("/")


def warn(text: str | UserError, seconds: float = 10, mark: str = "") -> None:
    """Show a note on the page that disappears after `seconds`. mark: a CSS class, for scripts."""
    shown = html.escape(str(text))  # Gradio shows it as HTML
    if mark:
        shown = f'<span class="{mark}">{shown}</span>'
    gr.Warning(shown, title="", duration=seconds)


class Server:
    """The endpoints for programs, the page's password and address, and the shutdown.

    find_engines: the models' engines, none while they are loading; options: those of app.py.
    """

    def __init__(
        self, find_engines: Callable[[], Sequence[AnyEngine]], options: argparse.Namespace
    ) -> None:
        self._find_engines, self._options = find_engines, options
        self._ended_by: int | None = None  # the signal that came
        self._auth = _user_and_password(options.auth)
        self._max_bytes = options.max_upload_mb * 2**20
        image_urls = ImageUrls((options.image_hosts or "").split(","), self._max_bytes)
        self.chat_service = ChatService(find_engines, image_urls, options.ignore_tools)
        self._keys = Keys(options.api_key or "", self._auth is not None)
        self._root_path = _root_path(options.root_path)
        self.offers_mcp = options.mcp
        if self.offers_mcp:
            check_package()
            gradio_patches.tune_mcp(mcp_bytes(self._max_bytes))

    @property
    def routes(self) -> list[BaseRoute]:
        """The routes that come before the page's own."""
        origins = self._options.cors_origins
        programs = endpoints(self.chat_service, self._keys, self._max_bytes, origins)
        return [Route("/manifest.json", _manifest), *programs]

    @property
    def launching(self) -> dict[str, Any]:
        """Arguments of `gr.Blocks.launch` for the password, the path, MCP and the application that
        it makes, which gets the endpoints as routes."""
        return {
            "mcp_server": self.offers_mcp,
            "app_kwargs": {
                "routes": self.routes,
                "lifespan": partial(sweeping, kept=in_folder),
                "exception_handlers": {
                    KeyError: _no_such_event,
                    httpx.InvalidURL: _no_such_host,
                    HTTPException: refuse,
                },
                "middleware": [
                    Middleware(Compression),
                    Middleware(Limits, max_bytes=self._max_bytes),
                    *([Middleware(McpGate, keys=self._keys)] if self.offers_mcp else []),
                ],
            },
            "auth": self._auth,
            "root_path": self._root_path,
        }

    @contextmanager
    def until_terminated(self, page: gr.Blocks) -> Iterator[None]:
        """On SIGTERM or Ctrl-C, refuse new questions and give running answers `shutdown_seconds`. A
        second one ends the program at once. KeyboardInterrupt after Ctrl-C."""

        # Signals that are ignored, as under nohup or in a script's background, stay ignored.
        heard = [ending for ending in ENDING if signal.getsignal(ending) is not signal.SIG_IGN]

        def terminate(number: int, _: object) -> None:
            for ending in heard:
                signal.signal(ending, signal.SIG_DFL)
            self._ended_by = number  # for `wait`: Python drops an exception inside a finalizer
            raise _Terminated(number)

        before = {ending: signal.signal(ending, terminate) for ending in heard}
        try:
            yield
        except _Terminated as terminated:
            by_hand = terminated.args == (signal.SIGINT,)
            self._end(page, by_hand)
            if by_hand:
                raise KeyboardInterrupt from None
        finally:
            for ending, handler in before.items():
                signal.signal(ending, handler)

    def wait(self, page: gr.Blocks) -> None:
        """Wait while the page is served. UserError after a GPU has failed and all visitors were
        told: a supervisor can then restart the program."""
        while page.is_running:
            if self._ended_by is not None:
                raise _Terminated(self._ended_by)
            if any(engine.fault == LOST for engine in self._find_engines()):
                self._end(page, by_hand=False)
                raise failure(LOST)
            time.sleep(0.1)

    def _end(self, page: gr.Blocks, by_hand: bool) -> None:
        seconds = self._options.shutdown_seconds
        if engines := self._find_engines():
            if by_hand and any(engine.running or engine.waiting for engine in engines):
                sentence = f"Waiting up to {seconds:g} s for running answers to end; "
                say(sentence + "press Ctrl-C again to stop at once.")
            with ThreadPoolExecutor(len(engines)) as pool:
                drained = [*pool.map(lambda engine: engine.drain(seconds), engines)]
            if not all(drained):
                log.warning("Shutdown cut answers short.")
            for engine in engines:
                engine.close()
            time.sleep(FLUSH_SECONDS)
        page.close(verbose=False)


async def _manifest(_: Request) -> Response:
    """The page's manifest. In Gradio's own, the icons' addresses are outside --root-path."""
    icons = [
        {"src": f"pwa_icon/{size}", "sizes": f"{size}x{size}", "type": "image/png"}
        for size in (192, 512)
    ]
    about = {
        "name": "MiniGPT-4",
        "icons": icons,
        "start_url": "./",
        "display": "standalone",
        "theme_color": "#faf9f7",  # --page in assets/theme.css
        "background_color": "#faf9f7",
    }
    return JSONResponse(about, media_type="application/manifest+json")


async def _no_such_event(request: Request, error: KeyError) -> Response:
    """The answer to an unknown event: Gradio looks up its number without a check."""
    if request.url.path.endswith(("/queue/join", "/run/predict")):
        return PlainTextResponse("The page has no such event: reload it.\n", 404)
    raise error


async def _no_such_host(_: Request, error: httpx.InvalidURL) -> Response:
    """The answer to a wrong header of a proxy, from which Gradio makes the page's address."""
    sentence = "The header X-Forwarded-Host is not a host: check the proxy that sends it.\n"
    return PlainTextResponse(sentence, 400)


class _Terminated(BaseException):
    """Raised with the signal's number. Like KeyboardInterrupt, it is not an Exception, so that no
    other handler catches it."""


def _root_path(text: str | None) -> str | None:
    """The path with a slash at its beginning and none at its end; a full address is allowed."""
    if text is None:
        return None
    path = text.strip(" /")
    if re.search(r"[\s?#]", path):
        raise UserError(f"--root-path is “{text}”: it must be a path such as /chat.")
    if address := re.match("https?://", path, re.IGNORECASE):
        return address[0].lower() + path[address.end() :]  # Gradio needs http(s) in lower case
    return f"/{path}" if path else path


def _user_and_password(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    user, _, password = text.rstrip("\r\n").partition(":")  # a file of secrets ends in a line break
    if not user.strip() or not password:
        raise UserError("--auth must be a name and a password: --auth ann:secret.")
    return user.strip(), password
