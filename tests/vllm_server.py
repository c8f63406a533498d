"""A server that follows vLLM's documented completions schema for prompt embeddings, strictly: an
unknown field, a wrong type or a tensor of another shape is refused. Its tokens are real: a decoder
computes them from the embeddings that come in.

As a program: python -m tests.vllm_server MODEL PORT [PACE], MODEL being nano or a parity case.
"""

import argparse
import asyncio
import base64
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minigpt4.config import get_model
from minigpt4.engine import Sampling
from minigpt4.engine.decoder import build_decoder
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.sampling import Sampler, log_softmax
from minigpt4.engine.scheduler import Rows
from minigpt4.weights.load import find_weights, load_model

PARITY = Path(__file__).parent / "parity"
CONTEXT = 2048


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = True
    continuous_usage_stats: bool = False


class Completion(BaseModel):
    """The fields of vLLM's CompletionRequest that may come with embeddings and are served here;
    whatever else it documents is no field of ours, and a mistake where it comes."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    prompt_embeds: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = []
    logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class Model:
    """The decoder and its blocks; one step at a time, as vLLM's engine."""

    def __init__(self, name: str) -> None:
        if name == "nano":
            config = get_model("nano")
            quantize = "int4" if _has_compiler() else "none"
            model = load_model(config, find_weights(config), quantize=quantize)
        else:
            from tests.parity_case import ParityCase

            model = ParityCase(PARITY / name).load()
        self.name, self.hidden_size = name, model.config.llm_hidden_size
        self.tokenizer = model.tokenizer
        self.decoder, count = build_decoder(model)
        self.free = list(range(count))
        self.lock = threading.Lock()

    def take(self, positions: int) -> list[int]:
        with self.lock:
            return [self.free.pop() for _ in range(-(-positions // BLOCK_SIZE))]

    def give_back(self, blocks: list[int]) -> None:
        with self.lock:
            self.free += blocks

    def step(self, blocks: list[int], start: int, tokens: list[int], embeds: np.ndarray):
        """Logits after these rows, which stand at `start`."""
        count = len(tokens)
        rows = Rows(
            np.array(tokens, np.int32),
            embeds,
            np.arange(start, start + count, dtype=np.int32),
            np.zeros(count, np.int32),
            np.array([blocks], np.int32),
            np.array([count - 1], np.int32),
        )
        with self.lock:
            return self.decoder.forward(rows)[0]


class Server:
    """answered, cancelled: completions that ended, and whose client went away first."""

    def __init__(self, model: Model, pace: float = 0.0, key: str = "") -> None:
        self.model, self.pace, self.key = model, pace, key
        self.answered = self.cancelled = self.running = 0
        self.bodies: list[dict] = []
        self.busy = False
        routes = [Route("/v1/completions", self.complete, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def complete(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refuse("Unauthorized", 401)
        if self.busy:
            return refuse("Too many requests", 429)
        try:
            raw = json.loads(await request.body())
            asked = Completion.model_validate(raw)
            if asked.stream_options and not asked.stream:
                raise ValueError("Stream options can only be defined when `stream=True`.")
            embeds = self.read(asked.prompt_embeds)
        except (ValidationError, ValueError) as error:
            return refuse(str(error))
        if len(embeds) + asked.max_tokens > CONTEXT:
            return refuse("This model's maximum context length is exceeded.")
        self.bodies.append({k: v for k, v in raw.items() if k != "prompt_embeds"})
        if asked.stream:
            events = self.events(asked, embeds)
            return StreamingResponse(events, media_type="text/event-stream")
        return refuse("only streams are served here", 501)

    def read(self, text: str) -> np.ndarray:
        """As vLLM's safe_load_prompt_embeds: a floating-point tensor [tokens, hidden_size]."""
        content = base64.b64decode(text, validate=True)
        try:
            tensor = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError("`prompt_embeds` could not be deserialized") from error
        good = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not good or tensor.dim() != 2:
            raise ValueError("`prompt_embeds` must be a 2D tensor of floating-point numbers")
        if tensor.shape[1] != self.model.hidden_size:
            raise ValueError(
                f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's "
                f"hidden_size {self.model.hidden_size}."
            )
        if len(content) > 4 * tensor.numel() + 10_000:
            raise ValueError("the file holds more than its tensor")
        return tensor.float().contiguous().numpy()

    async def events(self, asked: Completion, embeds: np.ndarray):
        self.running += 1
        blocks = self.model.take(len(embeds) + asked.max_tokens)
        try:
            async for event in self.generate(asked, embeds, blocks):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
            self.answered += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.model.give_back(blocks)

    async def generate(self, asked: Completion, embeds: np.ndarray, blocks: list[int]):
        model = self.model
        sampler = Sampler(
            Sampling(
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(asked.top_k, 0),
                min_p=asked.min_p,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                seed=asked.seed,
            )
        )
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model.name}
        said: list[int] = []
        rows, start = [-1 - i for i in range(len(embeds))], 0
        nothing = embeds[:0]
        while True:
            logits = await asyncio.to_thread(
                model.step, blocks, start, rows, embeds if start == 0 else nothing
            )
            await asyncio.sleep(self.pace)
            token = sampler(logits)
            said.append(token)
            stopped = token in asked.stop_token_ids
            full = len(said) == asked.max_tokens
            choice = {
                "index": 0,
                "text": "" if stopped else model.tokenizer.decode([token]),
                "logprobs": None,
                "finish_reason": "stop" if stopped else "length" if full else None,
                "stop_reason": token if stopped else None,
            }
            if asked.return_token_ids:
                choice["token_ids"] = [token]
            if asked.logprobs is not None:
                logprob = float(log_softmax(logits)[token])
                text = model.tokenizer.decode([token])
                choice["logprobs"] = {
                    "text_offset": [0],
                    "token_logprobs": [max(logprob, -9999.0)],
                    "tokens": [text],
                    "top_logprobs": [{text: logprob}],
                }
            yield head | {"choices": [choice]}
            if stopped or full:
                break
            start = len(embeds) + len(said) - 1
            rows = [token]
        if asked.stream_options and asked.stream_options.include_usage:
            usage = {"prompt_tokens": len(embeds), "completion_tokens": len(said)}
            yield head | {"choices": [], "usage": usage}


def refuse(sentence: str, status: int = 400) -> Response:
    error = {"message": sentence, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": error}, status)


def _has_compiler() -> bool:
    from minigpt4.engine.native import library

    return library() is not None


class Served:
    """A server in a thread of this process."""

    def __init__(self, server: Server) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server, self.url = server, f"http://127.0.0.1:{port}/v1"
        config = uvicorn.Config(server.app, port=port, log_level="error", lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Every connection is broken where it stands."""
        self._uvicorn.force_exit = self._uvicorn.should_exit = True
        self._thread.join(timeout=10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("pace", type=float, nargs="?", default=0.0)
    options = parser.parse_args()
    server = Server(Model(options.model), options.pace)
    uvicorn.run(server.app, port=options.port, log_level="error")


if __name__ == "__main__":
    main()
