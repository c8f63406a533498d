"""An answer as OpenAI's objects: whole, or in server-sent events."""

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator

from minigpt4.conversation import Answer
from minigpt4.engine import Engine, explain
from minigpt4.errors import UserError
from minigpt4.web.api.errors import failure

PAUSE_SECONDS = 15.0  # proxies close connections on which nothing comes for a minute
WAITING = b": waiting\n\n"  # a comment, which clients skip

log = logging.getLogger(__name__)


class Reply:
    """logprobs, include_usage: were they asked for?"""

    def __init__(self, engine: Engine, answer: Answer, logprobs: bool, include_usage: bool) -> None:
        self._decode = engine.model.tokenizer.decode
        self._answer = answer
        self._with_logprobs, self._with_usage = logprobs, include_usage
        self._told = 0  # tokens whose log-probabilities were given
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model.config.name,
        }

    def whole(self) -> dict:
        """The answer, once it has ended."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._answer.text, "refusal": None},
            "logprobs": self._logprobs(),
            "finish_reason": self._finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes, in server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for piece in _with_pauses(self._answer, PAUSE_SECONDS):
                yield WAITING if piece is None else self._chunk({"content": piece})
        except UserError as error:
            yield _event(json.loads(failure(error).body))
            return
        except Exception as error:
            log.exception("while answering a program")
            yield _event(json.loads(failure(explain(error)).body))
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
        """Those of the tokens that came since the last time."""
        if not self._with_logprobs:
            return None
        start, known = self._told, self._answer.logprobs
        self._told = len(known)
        return {
            "content": [
                self._logprob(token, logprob)
                for token, logprob in zip(
                    self._answer.tokens[start : self._told], known[start:], strict=True
                )
            ],
            "refusal": None,
        }

    def _logprob(self, token: int, logprob: float) -> dict:
        text = self._decode([token])
        whole = "\ufffd" not in text  # a part of a character has bytes that are not known here
        return {
            "token": text,
            "logprob": logprob if math.isfinite(logprob) else -9999.0,
            "bytes": list(text.encode()) if whole else None,
            "top_logprobs": [],
        }


async def _with_pauses(pieces: Answer, seconds: float) -> AsyncIterator[str | None]:
    """The pieces, and None whenever none has come for so long."""
    iterator = aiter(pieces)
    while True:
        upcoming = asyncio.ensure_future(anext(iterator))
        try:
            while not (await asyncio.wait([upcoming], timeout=seconds))[0]:
                yield None
            piece = upcoming.result()
        except StopAsyncIteration:
            return
        finally:
            upcoming.cancel()  # where nobody listens any more
        yield piece


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
