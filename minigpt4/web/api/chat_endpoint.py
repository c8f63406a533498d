"""/chat: the page's one endpoint for gradio's clients. Everything else of the page is private."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from minigpt4.errors import UserError
from minigpt4.web.api.asking import Asking
from minigpt4.web.api.chat_request import parse
from minigpt4.web.guard.uploads import uploaded

DESCRIPTION = (
    "Ask about a picture. history: messages {role, content} before this one, as OpenAI's API has "
    "them; settings left out are the model's own. Streams the answer so far; the last is whole."
)


def add_chat_endpoint(asking: Asking) -> None:
    """Add /chat to the page that is being built."""

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
        settings = {
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "num_beams": num_beams,
        }
        answer = None
        try:
            body = {"messages": _messages(message, history, system), **settings}
            asked = parse(body, asking.engine.model.config)
            answer = await asking.ask(asked, await _files(image))
            async for _ in answer:
                yield answer.text
            if not answer.text:
                yield ""
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            if answer is not None:
                answer.close()

    gr.api(chat, api_name="chat", api_description=DESCRIPTION, concurrency_limit=None)


def _messages(message: Any, history: Any, system: Any) -> list:
    """As OpenAI's API has them; `parse` checks them."""
    if not isinstance(history or [], list):
        raise UserError("history must be a list of messages.")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *(history or []), {"role": "user", "content": message}]


async def _files(image: Any) -> list[bytes]:
    """The content of the uploaded file; of no other file of this machine."""
    if image is None:
        return []
    path = image.get("path") if isinstance(image, dict) else getattr(image, "path", None)
    try:
        file = Path(uploaded(path))
    except UserError:
        sentence = "image must be an uploaded file: use gradio_client's handle_file."
        raise UserError(sentence) from None
    return [await run_in_threadpool(file.read_bytes)]
