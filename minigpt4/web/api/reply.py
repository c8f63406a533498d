"""Answers of the engine -> OpenAI's objects, whole or streamed."""

import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from minigpt4.conversation import Answer, texts_of
from minigpt4.engine import AnyEngine, explain
from minigpt4.errors import UserError
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.openapi import ChatCompletion
from minigpt4.web.api.schemas import ChatRequest

HEARTBEAT_SECONDS = 15.0  # proxies close connections on which nothing arrives for a minute
HEARTBEAT = b": waiting\n\n"  # a comment, which clients skip

log = logging.getLogger(__name__)


class ChoiceWriter:
    """One answer as a choice of OpenAI's completions."""

    def __init__(self, engine: AnyEngine, answer: Answer, index: int, request: ChatRequest) -> None:
        self._decode = engine.model.tokenizer.decode
        self._answer, self._index = answer, index
        self._with_logprobs = bool(request.logprobs)
        self._reported = 0  # tokens whose log-probabilities have been sent

    def whole(self) -> dict:
        """A chat.completion's choice, once the answer has ended."""
        message = {"role": "assistant", "content": self._answer.text, "refusal": None}
        return self._choice("message", message, self.finish_reason)

    def part(self, delta: dict, finish_reason: str | None = None) -> dict:
        """A chat.completion.chunk's choice."""
        return self._choice("delta", delta, finish_reason)

    @property
    def finish_reason(self) -> str:
        """OpenAI's reason, once the answer has ended."""
        return "stop" if self._answer.stop_reason == "stop" else "length"

    def _choice(self, name: str, content: dict, finish_reason: str | None) -> dict:
        return {
            "index": self._index,
            name: content,
            "logprobs": self.logprobs(),
            "finish_reason": finish_reason,
        }

    def logprobs(self) -> dict | None:
        """Log-probabilities of the tokens generated since the last call, if requested."""
        if not self._with_logprobs:
            return None
        start, known = self._reported, self._answer.logprobs
        self._reported = len(known)
        new = slice(start, self._reported)
        tokens, top = self._answer.tokens[new], self._answer.top_logprobs[new]
        content = [
            self._logprob(token, logprob)
            | {"top_logprobs": [self._logprob(*pair) for pair in likeliest]}
            for token, logprob, likeliest in zip(tokens, known[new], top, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict:
        text = self._decode([token])
        whole = "\ufffd" not in text  # if it is part of a character, its bytes are unknown here
        return {
            "token": text,
            "logprob": logprob if math.isfinite(logprob) else -9999.0,
            "bytes": list(text.encode()) if whole else None,
        }


class CompletionReply:
    """Answers to one request as OpenAI's chat.completion."""

    def __init__(self, engine: AnyEngine, answers: Sequence[Answer], request: ChatRequest) -> None:
        self._answers = answers
        self._choices = [ChoiceWriter(engine, a, i, request) for i, a in enumerate(answers)]
        self._with_usage = request.include_usage
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model.config.name,
        }

    def whole(self) -> dict:
        """The chat.completion, once the answers have ended."""
        choices = [choice.whole() for choice in self._choices]
        completion = {"object": "chat.completion", "choices": choices, "usage": self._usage}
        return ChatCompletion.model_validate(self._head | completion).model_dump()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events with the answers' texts as they are generated."""
        for choice in self._choices:
            yield self._chunk(choice.part({"role": "assistant", "content": ""}))
        try:
            async for number, text in texts_of(self._answers, HEARTBEAT_SECONDS):
                if number is None:
                    yield HEARTBEAT
                    continue
                choice = self._choices[number]
                part = choice.part({}, choice.finish_reason) if text is None else None
                yield self._chunk(part or choice.part({"content": text}))
        except Exception as error:
            yield event(refusal(error).body)
            return
        if self._with_usage:
            yield event(self._as_chunk([]) | {"usage": self._usage})
        yield b"data: [DONE]\n\n"

    def _chunk(self, choice: dict) -> bytes:
        return event(self._as_chunk([choice]))

    def _as_chunk(self, choices: list) -> dict:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._with_usage else {})

    @property
    def _usage(self) -> dict:
        prompt, tokens, reused = used(self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
        }


def used(answers: Sequence[Answer]) -> tuple[int, int, int]:
    """(tokens of the prompt, which the answers share; tokens generated; tokens of the prompt that
    were reused)."""
    first = answers[0].stats
    return first.prompt_tokens, sum(a.stats.tokens for a in answers), first.reused_tokens


def refusal(error: Exception) -> ApiError:
    """The error that ended an answer, as an ApiError; unexpected errors are logged."""
    if not isinstance(error, UserError):
        log.error("An answer to a program failed.", exc_info=error)
        error = explain(error)
    return ApiError.of(error)


def event(content: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"
