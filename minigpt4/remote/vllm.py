"""vLLM servers as an engine's backend: they get embeddings and return token ids.

The protocol (vLLM's "Prompt Embedding Inputs" and "Completions API"): POST /v1/completions with
`prompt_embeds`, the whole prompt's embeddings [tokens, hidden_size] as torch.save writes them, in
base64; with `return_token_ids`, each event of the stream has the ids of its tokens.
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from minigpt4.engine.decoder import thread_start
from minigpt4.engine.pictures import EmbeddingStore, Pictures
from minigpt4.engine.sampling import Sampling
from minigpt4.engine.scheduler import Request
from minigpt4.engine.stream import BROKEN, FULL, explain, failure
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, Picture
from minigpt4.model.prompt import Prompt
from minigpt4.remote.engine import Part, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt4.model.minigpt4 import MiniGPT4

DOWN_SECONDS = 10.0  # a failed server is skipped for this time, unless there is no other
BUSY_SECONDS = 1.0  # a full server is skipped for this time
SILENCE_SECONDS = 60.0  # a server that sends no byte for this time counts as dead
SLACK = 4  # a conversation leaves its server if that has over 4 answers more than another

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Server:
    url: str
    running: int = 0
    down_until: float = 0.0  # time.monotonic()
    fault: str = ""  # the kind of error that the last probe found


class Unreachable(Unavailable):
    """A server that cannot be reached, or sends nothing."""


class VllmServers:
    """Any number of servers with the same language model; the rest of the model runs here.

    urls: of their APIs, "http://host:8000/v1"; key: their --api-key; store: keeps image embeddings
    on disk. The network to them must be trusted: vLLM warns that malicious embeddings can crash it.
    """

    pause = 0.05

    def __init__(
        self,
        model: "MiniGPT4",
        urls: Sequence[str],
        key: str = "",
        store: EmbeddingStore | None = None,
    ) -> None:
        self._model = model
        self._servers = [_Server(_checked(url)) for url in urls]
        self.attempts = len(self._servers)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=3.0, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, trust_env=False
        )
        self._pictures = Pictures(model, explain, store)
        self._encoder = ThreadPoolExecutor(1, "encoder", thread_start(model.device))

    def check(self, request: Request) -> None:
        if request.sampling.num_beams > 1:
            raise UserError(
                "Beam search is not available if the language model runs on other servers "
                "(--llm-url): set num_beams to 1."
            )

    # --- pictures ------------------------------------------------------------------------------

    def encode(self, picture: Picture) -> Encoded:
        return self._request(picture).result()

    def _request(self, picture: Picture) -> Future[Encoded]:
        future = self._pictures.request(picture)
        if not future.done():
            self._encoder.submit(self._pictures.encode_some)
        return future

    async def _embeds(self, request: Request) -> dict[str, np.ndarray]:
        keys, pictures = request.prompt.picture_keys, request.pictures
        futures = {key: self._request(pictures[key]) for key in keys}
        # Shielded, since other requests may wait for the same picture.
        return {
            key: (await asyncio.shield(asyncio.wrap_future(future))).embeds
            for key, future in futures.items()
        }

    def _encoded(self, prompt: Prompt, generated: list[int], embeds: dict[str, np.ndarray]) -> str:
        """The embeddings of the prompt and of the tokens generated so far, in the form to send."""
        import torch

        device = self._model.device
        tensors = {k: torch.from_numpy(e).to(device) for k, e in embeds.items()}
        with torch.inference_mode():
            return as_base64(self._model.embed(prompt.followed_by(generated), tensors)[0])

    # --- answers -------------------------------------------------------------------------------

    async def generate(
        self, request: Request, generated: list[int], limit: int
    ) -> AsyncGenerator[Part, None]:
        embeds = await self._embeds(request)
        text = await asyncio.to_thread(self._encoded, request.prompt, generated, embeds)
        body = body_of(request, text, limit)
        server = self._choose(request.session)
        server.running += 1
        try:
            async for part in self._ask(server, body):
                yield part
        except Unavailable as error:
            busy = error.error.kind == "queue_full"
            server.down_until = time.monotonic() + (BUSY_SECONDS if busy else DOWN_SECONDS)
            raise type(error)(f"{server.url}: {error}", error.error) from None
        finally:
            server.running -= 1

    def _choose(self, session: str) -> _Server:
        """The conversation's own server, which has it cached, unless another has much less to do.
        If all have failed recently: the one that is to be skipped for the shortest time."""
        now = time.monotonic()
        up = [s for s in self._servers if s.down_until <= now]
        if not up:
            return min(self._servers, key=lambda s: s.down_until)
        own = max(up, key=lambda s: hashlib.sha256(f"{session} {s.url}".encode()).digest())
        idlest = min(up, key=lambda s: s.running)
        return own if own.running <= idlest.running + SLACK else idlest

    async def _ask(self, server: _Server, body: dict) -> AsyncGenerator[Part, None]:
        last: Part | None = None
        try:
            async with self._client.stream("POST", server.url + "/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise _refusal(reply.status_code, (await reply.aread())[:2000])
                async for line in reply.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    event = line.removeprefix("data:").strip()
                    if event == "[DONE]":
                        break
                    part = part_of(json.loads(event))
                    if part.ended:  # the number of reused tokens comes in a later event
                        last = part
                    elif last is not None:
                        last = Part(last.tokens, last.logprobs, last.ended, part.reused_tokens)
                    elif part.tokens:
                        yield part
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            if last is None:
                silent = isinstance(error, httpx.ConnectError | httpx.TimeoutException)
                kind = Unreachable if silent else Unavailable
                raise kind(str(error) or type(error).__name__) from None
        if last is not None:
            yield last

    # --- health --------------------------------------------------------------------------------

    async def probe(self, seconds: float) -> bool:
        outcomes = await self.probe_all(seconds)
        for server in self._servers:
            error = outcomes[server.url]
            fault = error.kind if error else ""
            if fault != server.fault:
                log.warning("%s: %s", server.url, error or "It answers again.")
            server.fault = fault
        return any(outcome is None for outcome in outcomes.values())

    async def probe_all(self, seconds: float) -> dict[str, UserError | None]:
        """Ask each server for a token. Returns URL -> None if it came, or else the error."""
        request = Request(Prompt([0], [0]), {}, Sampling(temperature=0.0, repetition_penalty=1.0))
        body = body_of(request, self._encoded(request.prompt, [], {}), 1)

        async def ask(server: _Server) -> UserError | None:
            try:
                async with asyncio.timeout(seconds):
                    tokens = [t async for p in self._ask(server, body) for t in p.tokens]
                error = None if len(tokens) == 1 else failure(BROKEN)
            except TimeoutError:
                error = UserError(f"{server.url} gave no token within {seconds:g} s.", "hanging")
            except Unavailable as why:
                error = why.error
                if error.kind == "hanging":
                    reason = " ".join(str(why).split())[:200]
                    sentence = f"The language model's server failed ({reason}): see its log."
                    if isinstance(why, Unreachable):
                        sentence = f"The language model's server does not answer ({reason}): "
                        sentence += "check --llm-url and the server's log."
                    error = UserError(sentence, error.kind)
            except UserError as why:
                error = why
            server.down_until = 0.0 if error is None else time.monotonic() + DOWN_SECONDS
            return error

        errors = await asyncio.gather(*map(ask, self._servers))
        return dict(zip((s.url for s in self._servers), errors, strict=True))

    async def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._pictures.fail_all(failure(BROKEN))
        await self._client.aclose()


def body_of(request: Request, prompt_embeds: str, limit: int) -> dict[str, Any]:
    """The request as vLLM's CompletionRequest: every field of `Sampling` except the beams."""
    left_out = ("num_beams", "max_new_tokens")  # vLLM has the others under the same names
    settings = {k: v for k, v in vars(request.sampling).items() if k not in left_out}
    body = {name: value for name, value in settings.items() if value is not None}
    body |= {
        "prompt_embeds": prompt_embeds,
        "max_tokens": limit,
        "stop_token_ids": sorted(request.stop_ids),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.logprobs:
        body["logprobs"] = 0  # of the chosen token only
    return body


def part_of(event: dict) -> Part:
    """The part in an event of the stream. Unavailable if it reports a failure; LookupError,
    TypeError or ValueError if it is malformed."""
    if "error" in event:
        raise Unavailable(str(event["error"])[:500])
    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
    if not event["choices"]:
        return Part(reused_tokens=details.get("cached_tokens") or 0)
    (choice,) = event["choices"]
    tokens = choice.get("token_ids")
    if tokens is None:
        raise UserError(
            "The language model's server sends no token ids: use a vLLM that supports "
            "return_token_ids.",
            "broken",
        )
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    reason = choice.get("finish_reason")
    if reason not in (None, "stop", "length"):
        raise Unavailable(f"the answer ended by “{reason}”")
    return Part([int(t) for t in tokens], [float(p) for p in logprobs], reason or "")


def _refusal(status: int, content: bytes) -> Exception:
    """The error for a status other than 200."""
    text = content.decode("utf-8", "replace")
    log.warning("a language model's server answered %d: %s", status, text)
    if status in (429, 503):
        return Unavailable(f"status {status}", failure(FULL))
    if status in (401, 403):
        sentence = "The language model's server rejects the key: see --llm-key."
    elif "enable-prompt-embeds" in text:
        sentence = "The language model's server accepts no embeddings: start vLLM with "
        sentence += "--enable-prompt-embeds."
    elif "hidden_size" in text:
        sentence = "The language model's server runs another model than --model: the widths of "
        sentence += "their embeddings differ."
    elif status < 500:
        sentence = f"The language model's server refused the request (status {status}): see its "
        sentence += "log and this program's."
    else:
        return Unavailable(f"status {status}")
    return UserError(sentence, "broken")


def _checked(url: str) -> str:
    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"“{url}” is not a server's address: --llm-url http://HOST:8000/v1.")
    return url


def as_base64(embeds: "Tensor") -> str:
    """A tensor in the form of vLLM's `prompt_embeds`: written by torch.save, in base64."""
    import torch

    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a view would be saved with its whole storage
    return base64.b64encode(file.getvalue()).decode("ascii")
