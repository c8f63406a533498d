"""Helpers of the API's tests: a server with a tiny random model, and ways to ask it."""

import base64
import io
import json
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from PIL import Image

import app
from minigpt4.engine import Engine
from minigpt4.web.page.page import build_page, serve
from minigpt4.web.server import Server
from tests.parity_case import ParityCase
from tests.running import until

MODEL = "vicuna_qformer_a"
web = httpx.Client(timeout=120)  # one for all: making one takes longer than asking
# The page's controls, in their order: temperature, top-p, penalty, tokens, beams, seed, system;
# then the name of the conversation that is shown.
SETTINGS = [0, 1.0, 1.0, 10, 1, "", "", None]
JSON = {"content-type": "application/json"}
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def options(*arguments: str) -> Namespace:
    return app.options(["--port", str(free_port()), *arguments])


def tiny_engine() -> Engine:
    """`engine.pace`: the seconds that each step takes longer than it needs."""
    engine = Engine(ParityCase(Path(__file__).parent / "parity" / MODEL).load())
    forward, engine.pace = engine.decoder.forward, 0.0

    def slow(rows):
        time.sleep(engine.pace)
        return forward(rows)

    engine.decoder.forward = slow
    return engine


@contextmanager
def served(
    find_engine: Callable[[], Engine | None], page_of: Engine, *arguments, feedback=None
) -> Iterator[str]:
    """The address of a server."""
    chosen = options(*arguments)
    server = Server(lambda: [engine] if (engine := find_engine()) else [], chosen)
    page = build_page(page_of, feedback, server)
    yield serve(page, chosen, server)
    page.close(verbose=False)


def engine_fixture():
    """A module's `engine`: the tiny one."""

    @pytest.fixture(scope="module")
    def engine():
        engine = tiny_engine()
        yield engine
        engine.close()

    return engine


def address_fixture(*arguments: str):
    """A module's `address`: a server of its `engine`, with options of app.py."""

    @pytest.fixture(scope="module")
    def address(engine):
        with served(lambda: engine, engine, *arguments) as address:
            yield address

    return address


def client(address: str, key: str = "none", **settings) -> OpenAI:
    settings = {"max_retries": 0, "timeout": 60, **settings}
    return OpenAI(base_url=address + "/v1", api_key=key, **settings)


def picture_file(color: str = "skyblue", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def question(text: str, *urls: str) -> dict:
    """A user's message with pictures, its text first, as most programs send it."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def page_events(address: str) -> dict[str, int]:
    """The page's events by the names of their handlers."""
    return {d["api_name"]: d["id"] for d in web.get(address + "/config").json()["dependencies"]}


def box(text: str) -> dict:
    """The message box."""
    return {"text": text, "files": []}


def join(address: str, event: int, data: object, session: str, event_data=None) -> httpx.Response:
    """Have the page do something, without listening to what comes of it."""
    sent = {"data": data, "fn_index": event, "session_hash": session, "event_data": event_data}
    content = json.dumps(sent)  # ASCII: halves of characters stay what they are
    return web.post(address + "/gradio_api/queue/join", content=content, headers=JSON)


def page_messages(address: str, session: str, seconds: float = 120) -> Iterator[dict]:
    """What the page is told until nothing of the session goes on."""
    end = time.monotonic() + seconds  # heartbeats keep a stream open for ever
    url = f"{address}/gradio_api/queue/data?session_hash={session}"
    rest = ""
    with web.stream("GET", url, timeout=seconds) as response:
        for text in response.iter_text():
            assert time.monotonic() < end, "only heartbeats"
            *lines, rest = (rest + text).split("\n")  # not at U+2028, as iter_lines does
            for line in lines:
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))


def page_event(
    address: str, event: int, data: object, session: str, event_data=None, seconds: float = 120
) -> dict | None:
    """The last message on an event of the page; None where it was not taken."""
    joined = join(address, event, data, session, event_data)
    if joined.status_code != 200:
        assert joined.status_code < 500, joined.text
        return None
    last = None
    for message in page_messages(address, session, seconds):
        last = message if message["msg"] == "process_completed" else last
    return last


def saved(address: str, events: dict[str, int], session: str, state=None) -> str | None:
    """The session's conversation as its page saves it in a file; None: there is none."""
    chosen = {"index": 0, "value": "json"}
    last = page_event(address, events["save"], [state], session, chosen)
    [file] = last["output"]["data"]
    return file and file["text"]


def at_rest(engine: Engine, seconds: float = 5.0) -> bool:
    return until(lambda: not (engine.running or engine.waiting), seconds)
