"""A program's request -> an answer: opens its pictures and puts its conversation to the engine."""

import asyncio
from collections.abc import Callable, Sequence

from starlette.concurrency import run_in_threadpool

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.model.image import MAX_PIXELS, Picture
from minigpt4.web.api.chat_request import ChatRequest
from minigpt4.web.guard import decoding
from minigpt4.web.guard.image_url import ImageUrls

OPENED_AT_ONCE = 2  # a picture being decoded may take hundreds of megabytes
PIXELS_TOGETHER = 4 * MAX_PIXELS
LOADING = "The model is still being loaded: try again in a minute."


class Asking:
    """Asks what programs ask, whichever endpoint they use.

    find_engine: the engine, None while it is being loaded.
    """

    def __init__(self, find_engine: Callable[[], Engine | None], urls: ImageUrls) -> None:
        self.find_engine = find_engine
        self.urls = urls
        self._opening = asyncio.Semaphore(OPENED_AT_ONCE)

    @property
    def engine(self) -> Engine:
        """UserError while it is being loaded."""
        engine = self.find_engine()
        if engine is None:
            raise UserError(LOADING, "loading")
        return engine

    async def ask(self, request: ChatRequest, pictures: Sequence[bytes] = ()) -> Answer:
        """The answer to be read. `pictures`: files that belong to the last question.

        UserError where it cannot be asked; nothing is left out of a conversation that is too long.
        """
        engine = self.engine
        engine.refuse_if_full()  # before the work of opening pictures
        conversation = await self._conversation(request, pictures)
        return await run_in_threadpool(
            ask,
            engine,
            conversation,
            request.sampling,
            stop=request.stop,
            trim=False,
            logprobs=request.logprobs,
        )

    async def _conversation(self, request: ChatRequest, files: Sequence[bytes]) -> Conversation:
        conversation = Conversation(system=request.system)
        pixels = 0
        for message in request.messages:
            if message.role == "assistant":
                conversation.add_answer(message.text)
                continue
            contents = [await self.urls.read(url) for url in message.pictures]
            if message is request.messages[-1]:
                contents += files
            pictures = [await self._open(content) for content in contents]
            pixels += sum(p.rgb.width * p.rgb.height for p in pictures)
            if pixels > PIXELS_TOGETHER:
                raise UserError(
                    f"The pictures have more than {PIXELS_TOGETHER / 1e6:g} megapixels together: "
                    "scale them down."
                )
            conversation.add_question(message.text, pictures)
        return conversation

    async def _open(self, content: bytes) -> Picture:
        async with self._opening:
            return await run_in_threadpool(decoding.load, content)
