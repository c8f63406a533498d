"""/chat: the page's only endpoint for gradio_client. The page's other events are private."""

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from minigpt4.errors import UserError
from minigpt4.web.api.service import ChatService
from minigpt4.web.guard.uploads import uploaded

DESCRIPTION = (
    "Ask about a picture. history: earlier messages {role, content}, as in OpenAI's API. A setting "
    "that is left out is the model's default. Streams the answer so far; the last item is complete."
)


def add_chat_endpoint(service: ChatService) -> None:
    """Add /chat to the page being built; called inside `gr.Blocks`."""

    async def chat(
        message: str,
        image: gr.FileData | None = None,
        history: list[dict] | None = None,
        system: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        num_beams: int | None = None,
    ) -> AsyncIterator[str]:
        messages = []
        try:
            messages = _messages(message, history, system)
            body = {
                "messages": messages,
                # Too long a conversation is refused: no header could say that turns were dropped.
                "truncation": "disabled",
                "temperature": temperature,
                "top_p": top_p,
                "max_tokens": max_tokens,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "num_beams": num_beams,
            }
            files = await run_in_threadpool(_files, image)
            async with aclosing(service.texts(body, files)) as texts:
                async for text in texts:
                    yield text
        except UserError as error:
            sentence = _renamed(str(error), bool(system), len(messages) - 1)
            raise gr.Error(sentence, print_exception=False) from None

    gr.api(chat, api_name="chat", api_description=DESCRIPTION, concurrency_limit=None)


def _messages(message: Any, history: Any, system: Any) -> list:
    """The messages in the form of OpenAI's API, which `read_chat` checks."""
    if not isinstance(history or [], list):
        raise UserError("history must be a list of messages.")
    if not isinstance(system or "", str):
        raise UserError("system must be a string.")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *(history or []), {"role": "user", "content": message}]


def _renamed(sentence: str, has_system: bool, last: int) -> str:
    """An error about a message, which it names by the argument that held it."""

    def name(found: re.Match) -> str:
        place, rest = int(found[1]), found[2] or ""
        if has_system and place == 0:
            return "system"
        return "message" if place == last else f"history[{place - has_system}]{rest}"

    return re.sub(r"messages\[(\d+)\](\.content(?!\[))?", name, sentence)


def _files(image: Any) -> list[bytes]:
    """The content of the uploaded file; UserError for any other file of this machine."""
    if image is None:
        return []
    path = image.get("path") if isinstance(image, dict) else getattr(image, "path", None)
    try:
        file = Path(uploaded(path))
    except UserError:
        sentence = "image must be an uploaded file: use gradio_client's handle_file."
        raise UserError(sentence) from None
    return [file.read_bytes()]
