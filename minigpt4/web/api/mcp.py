"""--mcp: questions about pictures as a tool of the Model Context Protocol, through Gradio's server.

Gradio answers at /gradio_api/mcp/. The tool uses the same service as /v1, so that pictures, lengths
and the queue have the same limits, and `McpGate` requires the same key.
"""

from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version

import gradio as gr
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.errors import UserError
from minigpt4.web.api.access import Keys
from minigpt4.web.api.errors import ApiError, plain
from minigpt4.web.api.service import ChatService
from minigpt4.web.guard.limits import parts_of

PATH = ("gradio_api", "mcp")
TOOL = "ask_about_picture"


def check_package() -> None:
    """UserError unless an `mcp` is installed that Gradio can use and that allows large requests."""
    try:
        major, minor = version("mcp").split(".")[:2]
    except PackageNotFoundError:
        major, minor = "0", "0"
    if major != "1" or int(minor) < 30:
        raise UserError("--mcp needs the package mcp: pip install 'mcp>=1.30,<2'.")


class ToolError(gr.Error):
    """The tool's error as a plain sentence: Gradio would show its own error in quotes."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, print_exception=False)

    def __str__(self) -> str:
        return self.message


def add_tool(service: ChatService) -> None:
    """Add the tool to the page being built; called inside `gr.Blocks`."""

    async def ask_about_picture(question: str, image: str, max_tokens: int | None = None) -> str:
        """Ask a vision-language model about a picture: what is in it, a description, a caption,
        a story about it. Each call stands for itself: the model remembers no earlier one.

        Args:
            question: the question, best in English
            image: the picture, as data:image/jpeg;base64,… or an address that the server may fetch
            max_tokens: the longest answer, in tokens; by default the model's own
        """
        picture = {"type": "image_url", "image_url": {"url": image}}
        content = [picture, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        try:
            async with aclosing(service.texts(body)) as texts:
                async for text in texts:
                    answer = text
        except UserError as error:
            raise ToolError(str(error)) from None
        return answer.strip()

    # Not through Gradio's queue: it calls the server over HTTP, as a client without the key.
    gr.api(ask_about_picture, api_name=TOOL, queue=False)


class McpGate:
    """ASGI middleware: lets through only Gradio's MCP route without sessions, and needs the key."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = parts_of(scope) if scope["type"] == "http" else ()
        if parts[:2] != PATH:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(parts, Request(scope))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, parts: tuple[str, ...], request: Request) -> Response | None:
        if parts != PATH:
            return PlainTextResponse("There is no such page.\n", 404)
        if request.method != "POST":
            sentence = "This address is for MCP clients, which send POST.\n"
            return PlainTextResponse(sentence, 405, {"Allow": "POST"})
        try:
            self._keys.check(request)
        except ApiError as error:
            return plain(error)
        return None
