"""What is served beside the page, on the same port, and how the server ends."""

import argparse
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.web.api.asking import Asking
from minigpt4.web.api.endpoints import endpoints
from minigpt4.web.api.keys import Keys
from minigpt4.web.guard.image_url import ImageUrls
from minigpt4.web.guard.limits import Limits
from minigpt4.web.guard.sweep import sweeping

LAST_WORDS = 0.5  # seconds for what was answered to reach the page

log = logging.getLogger(__name__)


class Server:
    """The endpoints for programs, with the page's own password and address.

    find_engine: the engine, None while it is being loaded. options: those of app.py.
    """

    def __init__(
        self, find_engine: Callable[[], Engine | None], options: argparse.Namespace
    ) -> None:
        self._find_engine, self._options = find_engine, options
        self._auth = _user_and_password(options.auth)
        # Gradio would download whatever public address a client names as an uploaded file, of any
        # size; it has no option against that.
        processing_utils.async_ssrf_protected_get = _fetch_nothing
        max_bytes = options.max_upload_mb * 2**20
        urls = ImageUrls((options.image_hosts or "").split(","), max_bytes)
        self.asking = Asking(find_engine, urls)
        self._keys = Keys(options.api_key or "", self._auth is not None)
        self._max_bytes = max_bytes

    @property
    def routes(self) -> list[BaseRoute]:
        """They stand before the page's own."""
        return endpoints(self.asking, self._keys, self._max_bytes)

    @property
    def launching(self) -> dict[str, Any]:
        """Arguments of `gr.Blocks.launch`, which knows how to share, to log in and to be mounted
        under a path: the endpoints become routes of the application that it makes."""
        return {
            "app_kwargs": {
                "routes": self.routes,
                "lifespan": sweeping,
                "exception_handlers": {KeyError: _no_such_event},
                "middleware": [Middleware(Limits, max_bytes=self._max_bytes)],
            },
            "auth": self._auth,
            "root_path": self._options.root_path,
        }

    @contextmanager
    def until_terminated(self, page: gr.Blocks) -> Iterator[None]:
        """SIGTERM ends what is done here: no more questions, and those that were taken have
        `shutdown_seconds` to be answered. A second one ends the program at once."""

        def terminate(*_: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            raise _Terminated

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        except _Terminated:
            self._end(page)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _end(self, page: gr.Blocks) -> None:
        engine = self._find_engine()
        if engine is not None:
            if not engine.drain(self._options.shutdown_seconds):
                log.warning("answers were cut short: the program was told to end")
            engine.close()
            time.sleep(LAST_WORDS)
        page.close(verbose=False)


async def _no_such_event(request: Request, error: KeyError) -> Response:
    """Gradio looks an event's number up before it knows whether there is one."""
    if request.url.path.endswith(("/queue/join", "/run/predict")):
        return PlainTextResponse("The page has no such event: load it again.\n", 404)
    raise error


async def _fetch_nothing(url: str) -> NoReturn:
    raise gr.Error("Send the picture's file, not its address.", print_exception=False)


class _Terminated(BaseException):
    """As KeyboardInterrupt: nobody else is to catch it."""


def _user_and_password(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user.strip() or not password:
        raise UserError("--auth takes a name and a password: --auth ann:secret.")
    return user.strip(), password
