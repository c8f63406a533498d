"""A program's request -> a conversation with its pictures -> answers of the engine."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import AnyEngine
from minigpt4.engine.stream import FULL, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.model.image_file import MAX_PIXELS
from minigpt4.model.prompt import Message
from minigpt4.model.vision import squash
from minigpt4.start import default_sampling
from minigpt4.web.api.body import read_chat
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.grammar import FormatConstraint, constraints
from minigpt4.web.api.schemas import ChatMessage, ChatRequest
from minigpt4.web.guard import decoding
from minigpt4.web.guard.image_url import ImageUrls

OPENED_AT_ONCE = 2  # decoding one picture may take hundreds of megabytes
MAX_PIXELS_TOGETHER = 4 * MAX_PIXELS
MAX_PREPARING = 16  # requests whose format is being prepared, or waits to be
LOADING = "The model is still loading: try again in a minute."


class ChatService:
    """Asks the engines for programs, whichever endpoint a request comes through.

    find_engines: the models' engines, none while they are loading. ignore_tools: see `read_chat`.
    """

    def __init__(
        self,
        find_engines: Callable[[], Sequence[AnyEngine]],
        image_urls: ImageUrls,
        ignore_tools: bool = False,
    ) -> None:
        self.find_engines = find_engines
        self.image_urls = image_urls
        self.ignore_tools = ignore_tools
        self._opening = asyncio.Semaphore(OPENED_AT_ONCE)
        self._one_prepares, self._preparing = asyncio.Semaphore(1), 0

    @property
    def engines(self) -> Sequence[AnyEngine]:
        """The engines. UserError while they are loading."""
        engines = self.find_engines()
        if not engines:
            raise UserError(LOADING, "loading")
        return engines

    def engine(
        self, model: str | None = None, otherwise: str = ", or leave model out"
    ) -> AnyEngine:
        """The engine of the model of this name, by default the first. ApiError if there is none.
        otherwise: what its message offers besides the other names."""
        engines = self.engines
        if model is None:
            return engines[0]
        names = [engine.model.config.name for engine in engines]
        if model not in names:
            offered = " or ".join(f"“{name}”" for name in names)
            sentence = f"There is no such model here: ask for {offered}{otherwise}."
            raise ApiError(sentence, 404, "model_not_found", "model")
        return engines[names.index(model)]

    async def ask(self, request: ChatRequest, pictures: Sequence[bytes] = ()) -> list[Answer]:
        """Start `request.n` answers, to be read by the caller. `pictures`: files for the last
        question.

        UserError if the request cannot be answered.
        """
        engine = self.engine(request.model)
        if (request.n or 1) > engine.most:
            sentence = f"n is more answers than this server gives at once: ask for {engine.most}."
            raise ApiError(sentence, param="n")
        engine.refuse_if_full()  # before the work of opening pictures
        conversation = await self.conversation(request, pictures)
        bound = await self._constraints(engine, request)
        return await run_in_threadpool(_submit, engine, conversation, request, bound)

    async def texts(self, body: dict, files: Sequence[bytes] = ()) -> AsyncGenerator[str, None]:
        """Yields the answer so far to a chat completion's body; the last text is complete. Without
        max_tokens, the model's default is the maximum. UserError as in `ask`."""
        if body.get("max_tokens") is None:
            most = default_sampling(self.engine().model.config).max_new_tokens
            body = body | {"max_tokens": most}
        request, _ = await run_in_threadpool(read_chat, body)
        (answer,) = await self.ask(request, files)
        try:
            async for _ in answer:
                yield answer.text
            if not answer.text:
                yield ""
        finally:
            answer.close()

    async def _constraints(
        self, engine: AnyEngine, request: ChatRequest
    ) -> Sequence[FormatConstraint | None]:
        """A constraint for each answer, None without a format. ApiError if it cannot be followed,
        or if many requests wait for theirs: one at a time is prepared."""
        count, wanted = request.n or 1, request.response_format
        format_ = wanted.of_answer if wanted else None
        if format_ is None:
            return [None] * count
        if self._preparing >= MAX_PREPARING:
            raise failure(FULL)
        self._preparing += 1
        try:
            async with self._one_prepares:
                return await run_in_threadpool(constraints, engine, format_, count)
        finally:
            self._preparing -= 1

    async def conversation(self, request: ChatRequest, files: Sequence[bytes] = ()) -> Conversation:
        """The messages and their opened pictures. ApiError for one that cannot be opened."""
        conversation = Conversation(system=request.system)
        size = self.engine(request.model).model.config.vision.image_size
        opened: list[int] = []  # pixels of each picture
        for place, message in enumerate(request.messages):
            if message.is_system:
                continue
            if message.role == "assistant":
                self._add_answer(conversation, message, message is request.messages[-1])
                continue
            if message.is_empty:  # an earlier turn
                continue
            pictures = await self._pictures(message, f"messages[{place}].content", size, opened)
            if message is request.messages[-1]:
                pictures += [await self._open(file, size, opened) for file in files]
            if sum(opened) > MAX_PIXELS_TOGETHER:
                limit = f"{MAX_PIXELS_TOGETHER / 1e6:g} megapixels"
                sentence = f"The pictures have more than {limit} together: scale them down."
                raise ApiError(sentence, param="messages")
            conversation.add_question(message.text, pictures)
        return conversation

    @staticmethod
    def _add_answer(conversation: Conversation, message: ChatMessage, last: bool) -> None:
        """Add an assistant's message. If it is the last one, it is an answer to continue, so its
        end matters. If that is empty, a new answer begins, as after a question."""
        if not last:
            conversation.add_answer(message.text)
        elif text := message.text.lstrip():
            conversation.messages.append(Message("assistant", (text,)))

    async def _pictures(
        self, message: ChatMessage, path: str, size: int, opened: list[int]
    ) -> list[Picture]:
        """The message's pictures. ApiError that names the part that cannot be opened."""
        pictures = []
        for place, url in message.images:
            try:
                pictures.append(await self._open(await self.image_urls.read(url), size, opened))
            except UserError as error:
                raise ApiError.of(error, f"{path}[{place}].image_url.url") from None
        return pictures

    async def _open(self, content: bytes, size: int, opened: list[int]) -> Picture:
        """The picture at the encoder's size, in pixels. An answer uses no more, and many pictures
        may be waiting in memory."""
        async with self._opening:
            picture = await run_in_threadpool(decoding.load, content)
            opened.append(picture.rgb.width * picture.rgb.height)
            return Picture(await run_in_threadpool(squash, picture.rgb, size), picture.key)


def _submit(
    engine: AnyEngine,
    conversation: Conversation,
    request: ChatRequest,
    bound: Sequence[FormatConstraint | None],
) -> list[Answer]:
    """Start all answers, or none. If a seed is given, each further answer has the next number."""
    config = engine.model.config
    sampling = request.sampling(config)
    answers: list[Answer] = []
    try:
        for number, constraint in enumerate(bound):
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
                    constraint=constraint,
                )
            )
    except UserError as error:
        for answer in answers:
            answer.close()
        raise ApiError.of(error, "messages" if error.kind == "too_long" else None) from None
    return answers
