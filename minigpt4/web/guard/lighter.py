"""What a visit to the page transfers: everything compressed, assets only once, and no library that
the page never uses."""

import gzip
import re
from functools import lru_cache
from pathlib import Path

import gradio
from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

FRONTEND = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
# Plays video streams, which this page has none of: Gradio's chat loads it all the same, 156 KB.
UNUSED = re.compile(r"hls-[\w-]+\.js")
# A hash of the content is part of the name.
_ASSET = re.compile(r"/assets/([\w-]+-[\w-]{8}\.(js|css))$")
_EXPORTS = re.compile(r"export\s*\{([^}]*)\}")


class Lighter:
    """ASGI middleware. The page itself is compressed each time, Gradio's assets once; browsers may
    keep these. UNUSED modules are replaced by modules that export nothing useful."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._compressed = app, GZipMiddleware(app, minimum_size=1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's start and end have no path
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        asset = _ASSET.search(path) if _takes_gzip(scope) else None
        if path in ("", "/"):
            await self._compressed(scope, receive, send)
        elif asset and (body := _compressed(asset[1])):
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
    return scope["method"] == "GET" and "gzip" in Headers(scope=scope).get("accept-encoding", "")


@lru_cache(1000)  # there are some 200
def _compressed(name: str) -> bytes:
    """A file of Gradio's, or what is sent in its place; empty where there is no such file."""
    try:
        body = (FRONTEND / name).read_bytes()
    except OSError:
        return b""
    return gzip.compress(_stub(body.decode()).encode() if UNUSED.fullmatch(name) else body)


def _stub(module: str) -> str:
    """A module with the same exports, each of which does nothing."""
    exports = _EXPORTS.search(module)
    names = re.findall(r"\bas\s+(\w+)", exports[1]) if exports else []
    return f"const e=()=>{{}};export{{{','.join(f'e as {name}' for name in names)}}}"
