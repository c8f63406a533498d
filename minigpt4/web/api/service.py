"""A program's request -> a conversation with its pictures -> answers of the engine."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import AnyEngine
from minigpt4.errors import UserError
from minigpt4.model.image import MAX_PIXELS, Picture
from minigpt4.model.prompt import Message as Turn
from minigpt4.model.vision import squash
from minigpt4.start import default_sampling
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.grammar import json_constraint
from minigpt4.web.api.schemas import ChatRequest, Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.image_url import ImageUrls

OPENED_AT_ONCE = 2  # decoding one picture may take hundreds of megabytes
MAX_PIXELS_TOGETHER = 4 * MAX_PIXELS
LOADING = "The model is still loading: try again in a minute."


class ChatService:
    """Puts programs' requests to the engine, whichever endpoint they come through.

    find_engine: the engine, None while it is loading.
    """

    def __init__(self, find_engine: Callable[[], AnyEngine | None], image_urls: ImageUrls) -> None:
        self.find_engine = find_engine
        self.image_urls = image_urls
        self._opening = asyncio.Semaphore(OPENED_AT_ONCE)

    @property
    def engine(self) -> AnyEngine:
        """UserError while it is loading."""
        engine = self.find_engine()
        if engine is None:
            raise UserError(LOADING, "loading")
        return engine

    async def ask(self, request: ChatRequest, pictures: Sequence[bytes] = ()) -> list[Answer]:
        """Start `request.n` answers, to be read by the caller. `pictures`: files for the last
        question.

        UserError where it cannot be asked.
        """
        engine = self.engine
        engine.refuse_if_full()  # before the work of opening pictures
        conversation = await self.conversation(request, pictures)
        return await run_in_threadpool(_submit, engine, conversation, request)

    async def conversation(self, request: ChatRequest, files: Sequence[bytes] = ()) -> Conversation:
        """The messages and their opened pictures. ApiError for one that cannot be opened."""
        conversation = Conversation(system=request.system)
        opened: list[int] = []  # pixels of each picture
        for place, message in enumerate(request.messages):
            if message.is_system:
                continue
            if message.role == "assistant":
                self._add_answer(conversation, message, message is request.messages[-1])
                continue
            pictures = await self._pictures(message, f"messages[{place}].content", opened)
            if message is request.messages[-1]:
                pictures += [await self._open(file, opened) for file in files]
            if sum(opened) > MAX_PIXELS_TOGETHER:
                limit = f"{MAX_PIXELS_TOGETHER / 1e6:g} megapixels"
                sentence = f"The pictures have more than {limit} together: scale them down."
                raise ApiError(sentence, param="messages")
            conversation.add_question(message.text, pictures)
        return conversation

    @staticmethod
    def _add_answer(conversation: Conversation, message: Message, last: bool) -> None:
        """The last message of a request may be an answer to continue: how it ends matters. An empty
        one begins the answer, as a question in its place does."""
        if not last:
            conversation.add_answer(message.text)
        elif text := message.text.lstrip():
            conversation.messages.append(Turn("assistant", (text,)))

    async def _pictures(self, message: Message, path: str, opened: list[int]) -> list[Picture]:
        """The message's pictures. ApiError that names the part that cannot be opened."""
        pictures = []
        for place, url in message.images:
            try:
                pictures.append(await self._open(await self.image_urls.read(url), opened))
            except UserError as error:
                raise ApiError.of(error, f"{path}[{place}].image_url.url") from None
        return pictures

    async def _open(self, content: bytes, opened: list[int]) -> Picture:
        """The picture at the encoder's size: an answer takes no more of it, and many may wait."""
        async with self._opening:
            picture = await run_in_threadpool(decoding.load, content)
            opened.append(picture.rgb.width * picture.rgb.height)
            size = self.engine.model.config.vision.image_size
            return Picture(await run_in_threadpool(squash, picture.rgb, size), picture.key)


def _submit(engine: AnyEngine, conversation: Conversation, request: ChatRequest) -> list[Answer]:
    """Where the seed is given, each answer has the next one. All are asked, or none."""
    config = engine.model.config
    schema = request.response_format.schema_of_answer if request.response_format else None
    sampling = request.sampling(config)
    answers: list[Answer] = []
    try:
        for number in range(request.n or 1):
            seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
            answers.append(
                ask(
                    engine,
                    conversation,
                    replace(sampling, seed=seed),
                    stop=request.stop or (),
                    trim=request.truncation != "disabled",
                    logprobs=bool(request.logprobs),
                    top_logprobs=request.top_logprobs or 0,
                    reserve=default_sampling(config).max_new_tokens,
                    constraint=json_constraint(engine, schema) if schema is not None else None,
                )
            )
    except UserError as error:
        for answer in answers:
            answer.close()
        raise ApiError.of(error, "messages" if error.kind == "too_long" else None) from None
    return answers
