"""A program's request -> an answer of the engine -> OpenAI's objects, whole or streamed."""

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.concurrency import run_in_threadpool

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.engine import AnyEngine, explain
from minigpt4.errors import UserError
from minigpt4.model.image import MAX_PIXELS, Picture
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.openapi import ChatCompletion
from minigpt4.web.api.schemas import ChatRequest, Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.image_url import ImageUrls

OPENED_AT_ONCE = 2  # decoding one picture may take hundreds of megabytes
MAX_PIXELS_TOGETHER = 4 * MAX_PIXELS
LOADING = "The model is still loading: try again in a minute."
HEARTBEAT_SECONDS = 15.0  # proxies close connections on which nothing arrives for a minute
HEARTBEAT = b": waiting\n\n"  # a comment, which clients skip

log = logging.getLogger(__name__)


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

    async def ask(self, request: ChatRequest, pictures: Sequence[bytes] = ()) -> Answer:
        """Start an answer, to be read by the caller. `pictures`: files for the last question.

        UserError where it cannot be asked. A conversation that is too long is refused, not trimmed.
        """
        engine = self.engine
        engine.refuse_if_full()  # before the work of opening pictures
        conversation = await self._conversation(request, pictures)
        try:
            return await run_in_threadpool(
                ask,
                engine,
                conversation,
                request.sampling(engine.model.config),
                stop=request.stop or (),
                trim=False,
                logprobs=bool(request.logprobs),
            )
        except UserError as error:
            raise ApiError.of(error, "messages" if error.kind == "too_long" else None) from None

    async def _conversation(self, request: ChatRequest, files: Sequence[bytes]) -> Conversation:
        conversation = Conversation(system=request.system)
        pixels = 0
        for place, message in enumerate(request.messages):
            if message.is_system:
                continue
            if message.role == "assistant":
                conversation.add_answer(message.text)
                continue
            pictures = await self._pictures(message, f"messages[{place}].content")
            if message is request.messages[-1]:
                pictures += [await self._open(file) for file in files]
            pixels += sum(p.rgb.width * p.rgb.height for p in pictures)
            if pixels > MAX_PIXELS_TOGETHER:
                limit = f"{MAX_PIXELS_TOGETHER / 1e6:g} megapixels"
                sentence = f"The pictures have more than {limit} together: scale them down."
                raise ApiError(sentence, param="messages")
            conversation.add_question(message.text, pictures)
        return conversation

    async def _pictures(self, message: Message, path: str) -> list[Picture]:
        """The message's pictures. ApiError that names the part that cannot be opened."""
        pictures = []
        for place, url in message.images:
            try:
                pictures.append(await self._open(await self.image_urls.read(url)))
            except UserError as error:
                raise ApiError.of(error, f"{path}[{place}].image_url.url") from None
        return pictures

    async def _open(self, content: bytes) -> Picture:
        async with self._opening:
            return await run_in_threadpool(decoding.load, content)


class CompletionReply:
    """An answer as OpenAI's chat.completion; logprobs, include_usage: whether to report them."""

    def __init__(
        self, engine: AnyEngine, answer: Answer, logprobs: bool, include_usage: bool
    ) -> None:
        self._decode = engine.model.tokenizer.decode
        self._answer = answer
        self._with_logprobs, self._with_usage = logprobs, include_usage
        self._reported = 0  # tokens whose log-probabilities have been sent
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model.config.name,
        }

    def whole(self) -> dict:
        """The chat.completion, once the answer has ended."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._answer.text, "refusal": None},
            "logprobs": self._logprobs(),
            "finish_reason": self._finish_reason,
        }
        completion = {"object": "chat.completion", "choices": [choice], "usage": self._usage}
        return ChatCompletion.model_validate(self._head | completion).model_dump()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events with the answer's text as it is generated."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for text in _with_heartbeat(self._answer, HEARTBEAT_SECONDS):
                yield HEARTBEAT if text is None else self._chunk({"content": text})
        except UserError as error:
            yield _event(ApiError.of(error).body)
            return
        except Exception as error:
            log.exception("An answer to a program failed.")
            yield _event(ApiError.of(explain(error)).body)
            return
        yield self._chunk({}, self._finish_reason)
        if self._with_usage:
            yield _event(self._as_chunk([]) | {"usage": self._usage})
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(),
            "finish_reason": finish_reason,
        }
        return _event(self._as_chunk([choice]))

    def _as_chunk(self, choices: list) -> dict:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._with_usage else {})

    @property
    def _finish_reason(self) -> str:
        return "stop" if self._answer.stop_reason == "stop" else "length"

    @property
    def _usage(self) -> dict:
        stats = self._answer.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.tokens,
            "total_tokens": stats.prompt_tokens + stats.tokens,
            "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        }

    def _logprobs(self) -> dict | None:
        """Log-probabilities of the tokens generated since the last call."""
        if not self._with_logprobs:
            return None
        start, known = self._reported, self._answer.logprobs
        self._reported = len(known)
        return {
            "content": [
                self._logprob(token, logprob)
                for token, logprob in zip(
                    self._answer.tokens[start : self._reported], known[start:], strict=True
                )
            ],
            "refusal": None,
        }

    def _logprob(self, token: int, logprob: float) -> dict:
        text = self._decode([token])
        whole = "\ufffd" not in text  # the bytes of part of a character are not known here
        return {
            "token": text,
            "logprob": logprob if math.isfinite(logprob) else -9999.0,
            "bytes": list(text.encode()) if whole else None,
            "top_logprobs": [],
        }


async def _with_heartbeat(texts: Answer, seconds: float) -> AsyncIterator[str | None]:
    """The answer's text as it comes, and None whenever nothing came for `seconds`."""
    iterator = aiter(texts)
    while True:
        upcoming = asyncio.ensure_future(anext(iterator))
        try:
            while not (await asyncio.wait([upcoming], timeout=seconds))[0]:
                yield None
            text = upcoming.result()
        except StopAsyncIteration:
            return
        finally:
            upcoming.cancel()  # where the client has gone
        yield text


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
