"""What the page's first visit transfers: the page compressed, and no library that it never uses."""

import re
from pathlib import Path

import gradio
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

FRONTEND = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
# Plays video streams, which this page has none of: Gradio's chat loads it all the same, 156 KB.
UNUSED = re.compile(r"/assets/(hls-[\w-]+\.js)$")
_EXPORTS = re.compile(r"export\s*\{([^}]*)\}")


class Lighter:
    """ASGI middleware: gzip for the page itself (Gradio compresses its assets), and modules that
    export nothing useful in place of UNUSED ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._compressed = app, GZipMiddleware(app, minimum_size=1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's start and end have no path
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        unused = UNUSED.search(path)
        if path in ("", "/"):
            await self._compressed(scope, receive, send)
        elif unused and (stub := _stub(unused[1])):
            headers = {"cache-control": "public, max-age=31536000, immutable"}
            response = Response(stub, media_type="text/javascript", headers=headers)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _stub(name: str) -> str:
    """A module with the same exports as a file of Gradio's, each of which does nothing; "" where
    there is no such file."""
    try:
        exports = _EXPORTS.search((FRONTEND / name).read_text(encoding="utf-8"))
    except OSError:
        return ""
    names = re.findall(r"\bas\s+(\w+)", exports[1]) if exports else []
    return f"const e=()=>{{}};export{{{','.join(f'e as {name}' for name in names)}}}"
