"""The soak test's users: they ask over the API and on the page, stop, vanish and send rubbish."""

import asyncio
import base64
import dataclasses
import html
import io
import json
import random
import re
import secrets
import time
from collections import Counter

import httpx
import numpy as np
from PIL import Image

TIMEOUT = httpx.Timeout(400.0, connect=60.0)
AT_MOST = 400.0  # seconds for anything a user does
SETTINGS = {"temperature": 0, "top_p": 1.0, "repetition_penalty": 1.05, "num_beams": 1}
TOKENS = 20  # of an answer
NONCE = re.compile(r"\b[a-z]{3}\d{4}\b")
# Sentences that say why there is no answer, and what makes them right.
REFUSALS = ("too many people", "is ending", "too many large pictures")
FAULTS = ("went wrong", "not enough memory", "stopped responding", "not be read", "disk")


@dataclasses.dataclass
class Asked:
    """A question and its answer, to be asked again when nobody else is there."""

    question: str
    picture: bytes | None
    answer: str
    logprobs: list[float] | None  # of an answer over the API


@dataclasses.dataclass
class Ledger:
    """What all users saw."""

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    asked: list[Asked] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    nonces: set[str] = dataclasses.field(default_factory=set)
    fault_until: float = 0.0  # answers may fail so long
    chats: int = 0  # at this moment
    most_chats: int = 0

    def lost(self, what: str) -> None:
        self.outcomes["lost"] += 1
        self.wrong.append(f"lost: {what}"[:300])

    def answered(self, asked: Asked, nonce: str) -> None:
        foreign = set(NONCE.findall(asked.answer)) & (self.nonces - {nonce})
        if foreign:
            self.outcomes["foreign"] += 1
            self.wrong.append(f"foreign: {foreign} in an answer to {nonce}")
        self.outcomes["answered"] += 1
        self.asked.append(asked)

    def failed(self, sentence: str) -> None:
        """There was an error instead of an answer: is it one that there was a reason for?"""
        lower = sentence.lower()
        if any(known in lower for known in REFUSALS):
            self.outcomes["refused"] += 1
        elif time.monotonic() < self.fault_until:
            self.outcomes["failed by a fault"] += 1
        else:
            self.lost(f"without a fault: {sentence}")


def picture(seed: int) -> bytes:
    """A PNG that is nobody else's: coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((160, 160), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def body(question: str, content: bytes | None, **more) -> dict:
    """What the API is asked; greedy, so that the answer is the same whenever it is given."""
    parts: list[dict] = []
    if content:
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": TOKENS, **SETTINGS, **more}


class User:
    """One of many; what it does next is drawn from its own seed."""

    def __init__(self, address: str, number: int, ledger: Ledger, page: dict) -> None:
        self._address, self._ledger, self._page = address, ledger, page
        self._random = random.Random(number)
        self._warning = ""  # what the page said last
        self._client = httpx.AsyncClient(base_url=address, timeout=TIMEOUT, trust_env=False)

    async def live(self, end: float) -> None:
        """Until `end`, in seconds of time.monotonic()."""
        from benchmarks.soak.rubbish import send_rubbish

        doings = {
            self._ask: 5,
            self._ask_streamed: 6,
            self._ask_on_page: 6,
            self._stop: 2,
            self._vanish: 2,
            self._read_slowly: 1,
            self._probe: 1,
            lambda: send_rubbish(self._client, self._address, self._random, self._ledger): 3,
        }
        try:
            while time.monotonic() < end:
                do = self._random.choices(list(doings), list(doings.values()))[0]
                try:
                    async with asyncio.timeout(AT_MOST):  # heartbeats keep a dead stream open
                        await do()
                except (httpx.TimeoutException, TimeoutError):
                    self._ledger.lost(f"no end within {TIMEOUT.read} s in {do}")
                except httpx.TransportError as error:
                    self._ledger.lost(f"{error!r} at {error.request.method} {error.request.url}")
                await asyncio.sleep(self._random.expovariate(1.0))
        finally:
            await self._client.aclose()

    def _question(self) -> tuple[str, bytes | None, str]:
        nonce = "".join(self._random.choices("bcdfghjklmnpqrstvwxz", k=3))
        nonce += str(self._random.randrange(1000, 10000))
        self._ledger.nonces.add(nonce)
        if self._random.random() < 0.5:
            return f"My word is {nonce}. What is my word?", None, nonce
        text = f"{nonce}: describe this image briefly."
        return text, picture(self._random.getrandbits(32)), nonce

    async def _ask(self) -> None:
        question, content, nonce = self._question()
        response = await self._post(body(question, content, logprobs=True))
        reply = response.json()
        if response.status_code != 200:
            self._ledger.failed(reply["error"]["message"])
            return
        choice = reply["choices"][0]
        logprobs = [t["logprob"] for t in choice["logprobs"]["content"]]
        self._ledger.answered(
            Asked(question, content, choice["message"]["content"], logprobs), nonce
        )

    async def _post(self, content: dict) -> httpx.Response:
        with Chatting(self._ledger):
            return await self._client.post("/v1/chat/completions", json=content)

    async def _ask_streamed(self, pause: float = 0.0) -> None:
        question, content, nonce = self._question()
        text, logprobs, done = "", [], False
        sent = body(question, content, stream=True, logprobs=True)
        with Chatting(self._ledger):
            async with self._client.stream("POST", "/v1/chat/completions", json=sent) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._ledger.failed(response.json()["error"]["message"])
                    return
                async for event in _events(response):
                    if event == "[DONE]":
                        done = True
                        continue
                    chunk = json.loads(event)
                    if "error" in chunk:
                        self._ledger.failed(chunk["error"]["message"])
                        return
                    choice = chunk["choices"][0]
                    text += choice["delta"].get("content", "")
                    logprobs += [t["logprob"] for t in choice["logprobs"]["content"]]
                    await asyncio.sleep(pause)
        if not done:
            self._ledger.lost("a stream without an end")
            return
        self._ledger.answered(Asked(question, content, text, logprobs), nonce)

    async def _read_slowly(self) -> None:
        await self._ask_streamed(pause=0.5)

    async def _vanish(self) -> None:
        """In the middle of an answer, or before it: of the API's, or of the page's."""
        if self._random.random() < 0.5:
            await self._close_tab()
            return
        question, content, _ = self._question()
        sent = body(question, content, stream=True) | {"max_tokens": 400}
        with Chatting(self._ledger):
            async with self._client.stream("POST", "/v1/chat/completions", json=sent) as response:
                count = self._random.randrange(6)
                async for _ in response.aiter_bytes():
                    count -= 1
                    if count < 0:
                        break
        self._ledger.outcomes["vanished"] += 1

    async def _close_tab(self) -> None:
        question, _, _ = self._question()
        session = secrets.token_hex(6)
        data = [{"text": question, "files": []}, None, *self._settings(400)]
        with Chatting(self._ledger):
            await self._join(session, "ask", data)
            query = {"session_hash": session}
            async with self._client.stream(
                "GET", "/gradio_api/queue/data", params=query
            ) as response:
                count = self._random.randrange(12)
                async for _ in _events(response):
                    count -= 1
                    if count < 0:
                        break
        self._ledger.outcomes["vanished"] += 1

    async def _probe(self) -> None:
        assert (await self._client.get("/healthz")).status_code == 200
        ready = await self._client.get("/readyz")
        if ready.status_code != 200 and time.monotonic() > self._ledger.fault_until:
            self._ledger.outcomes["not ready"] += 1
        assert (await self._client.get("/metrics")).status_code == 200
        self._ledger.outcomes["probed"] += 1

    # --- the page, as a browser uses it ----------------------------------------------------------

    async def _ask_on_page(self, stop: bool = False) -> None:
        question, content, nonce = self._question()
        session = secrets.token_hex(6)
        heart = asyncio.create_task(self._beat(session))
        try:
            with Chatting(self._ledger):
                data = await self._page_answer(session, question, content, stop)
        finally:
            heart.cancel()
        if stop:
            self._ledger.outcomes["stopped"] += 1
        elif data is not None:
            text = _last_text(data)
            if text is None or text.startswith("<small>"):
                self._ledger.failed(text or self._warning)
            else:
                self._ledger.answered(Asked(question, content, text, None), nonce)

    async def _beat(self, session: str) -> None:
        async with self._client.stream("GET", f"/gradio_api/heartbeat/{session}") as response:
            async for _ in response.aiter_bytes():
                pass

    async def _page_answer(self, session, question, content, stop) -> list | None:
        """The last values of (messages, box, status); None where the ledger has been told."""
        files = []
        if content:
            sent = {"files": ("picture.png", content, "image/png")}
            uploaded = await self._client.post("/gradio_api/upload", files=sent)
            if uploaded.status_code != 200:
                self._ledger.failed(f"disk: {uploaded.status_code}")
                return None
            meta = {"_type": "gradio.FileData"}
            files = [{"path": uploaded.json()[0], "orig_name": "picture.png", "meta": meta}]
        data = [{"text": question, "files": files}, None, *self._settings(400 if stop else TOKENS)]
        event = await self._join(session, "ask", data)
        stopping = None
        if stop:
            stopping = asyncio.create_task(self._stop_soon(session))
        try:
            return await self._finished(session, event)
        finally:
            if stopping:
                await asyncio.gather(stopping, return_exceptions=True)

    def _settings(self, tokens: int) -> list:
        values = {**SETTINGS, "max_new_tokens": tokens, "seed": "", "system": ""}
        return [*(values[name] for name in self._page["settings"]), None]

    async def _join(self, session: str, name: str, data: list) -> str:
        sent = {"data": data, "fn_index": self._page["events"][name], "session_hash": session}
        response = await self._client.post("/gradio_api/queue/join", json=sent)
        response.raise_for_status()
        return response.json()["event_id"]

    async def _finished(self, session: str, event: str) -> list | None:
        query = {"session_hash": session}
        async with self._client.stream("GET", "/gradio_api/queue/data", params=query) as response:
            async for line in _events(response):
                message = json.loads(line)
                if message["msg"] == "log":
                    self._warning = message["log"]
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    if not message["success"]:
                        self._ledger.failed(str(message["output"].get("error")))
                        return None
                    return message["output"]["data"]
        self._ledger.lost("a page's stream without an end")
        return None

    async def _stop_soon(self, session: str) -> None:
        await asyncio.sleep(self._random.expovariate(0.5))
        sent = {"data": [None], "fn_index": self._page["events"]["stop"], "session_hash": session}
        (await self._client.post("/gradio_api/run/predict", json=sent)).raise_for_status()

    async def _stop(self) -> None:
        await self._ask_on_page(stop=True)


class Chatting:
    """Counts who waits for an answer."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> None:
        self._ledger.chats += 1
        self._ledger.most_chats = max(self._ledger.most_chats, self._ledger.chats)

    def __exit__(self, *_: object) -> None:
        self._ledger.chats -= 1


async def _events(response: httpx.Response):
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _last_text(data: list) -> str | None:
    messages = data[0]
    if not messages or messages[-1]["role"] != "assistant":
        return None
    content = messages[-1]["content"]
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return html.unescape(content)
