"""Compression and caching of the page and Gradio's assets, without libraries that the page never
uses."""

import asyncio
import gzip
import re
from functools import cache
from pathlib import Path

import gradio
from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.web.guard.limits import inner_path

FRONTEND = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
# A player of video streams (156 KB), which Gradio's chat always loads. This page has no videos.
UNUSED = re.compile(r"hls-[\w-]+\.js")
# The names of assets contain a hash of the content. Gradio serves files with other names.
_ASSET = re.compile(r"/assets/([\w-]+-[\w-]{8}\.(js|css))")
_GZIP = re.compile(r"(?i)\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
_EXPORTS = re.compile(r"export\s*\{([^}]*)\}")


class Compression:
    """ASGI middleware. The page itself is compressed each time it is sent; Gradio's assets only
    when they are first requested, and browsers may cache them. UNUSED modules are replaced by
    modules with the same exports that do nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._compressed = app, GZipMiddleware(app, minimum_size=1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _takes_gzip(scope):
            await self._app(scope, receive, send)
            return
        path = inner_path(scope)
        asset = _ASSET.fullmatch(path) if scope["method"] == "GET" else None
        if path in ("", "/"):
            await self._compressed(scope, receive, send)
        elif asset and asset[1] in _names():
            body = await asyncio.to_thread(_compressed, asset[1])
            headers = {
                "content-encoding": "gzip",
                "vary": "accept-encoding",
                "cache-control": "public, max-age=31536000, immutable",
            }
            kind = "text/javascript" if asset[2] == "js" else "text/css"
            await Response(body, media_type=kind, headers=headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _takes_gzip(scope: Scope) -> bool:
    return _GZIP.search(Headers(scope=scope).get("accept-encoding", "")) is not None


@cache
def _names() -> frozenset[str]:
    return frozenset(file.name for file in FRONTEND.iterdir())


@cache
def _compressed(name: str) -> bytes:
    """A file of Gradio, or its replacement."""
    body = (FRONTEND / name).read_bytes()
    return gzip.compress(_stub(body.decode()).encode() if UNUSED.fullmatch(name) else body)


def _stub(module: str) -> str:
    """A module with the same exports, each of which does nothing."""
    exports = _EXPORTS.search(module)
    names = re.findall(r"\bas\s+(\w+)", exports[1]) if exports else []
    return f"const e=()=>{{}};export{{{','.join(f'e as {name}' for name in names)}}}"
