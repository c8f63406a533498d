"""Clients that do not keep to the protocol, on a real server: afterwards the next request works."""

import asyncio
import errno
import json
import logging
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import httpx
import psutil
import pytest
from gradio.queueing import Queue
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse

from minigpt4 import conversation as chat
from minigpt4.engine import Engine
from minigpt4.model import image
from minigpt4.start import default_sampling
from minigpt4.web.guard import uploads
from minigpt4.web.guard.gradio_patches import MAX_UNREAD_EVENTS
from minigpt4.web.guard.limits import FILES_AT_ONCE, TEXT_BYTES, Limits
from minigpt4.web.guard.uploads import CUT_SECONDS, KEPT_SECONDS, sweep
from minigpt4.web.page import session as session_module
from minigpt4.web.page.examples import EXAMPLES, in_folder
from minigpt4.web.page.render import verbatim
from tests.api_case import (
    JSON,
    SETTINGS,
    address_fixture,
    at_rest,
    box,
    data_url,
    engine_fixture,
    join,
    page_event,
    page_events,
    page_messages,
    picture_file,
    question,
    saved,
    web,
)
from tests.running import until, wait_for

FILE = {"meta": {"_type": "gradio.FileData"}}


engine, address = engine_fixture(), address_fixture("--max-upload-mb", "1")


@pytest.fixture(autouse=True)
def works_afterwards(address, engine):
    engine.pace = 0.0
    yield
    engine.pace = 0.0
    assert at_rest(engine, 20)
    assert ask(address, "Hello?").status_code == 200


def ask(address, text, *urls, **settings) -> httpx.Response:
    body = {"messages": [question(text, *urls)], "max_tokens": 8, "temperature": 0, **settings}
    return web.post(address + "/v1/chat/completions", json=body, timeout=120)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def upload(address, content: bytes, name: str = "a.png", **more) -> httpx.Response:
    files = {"files": (name, content, "image/png")}
    return web.post(address + "/gradio_api/upload", files=files, timeout=120, **more)


# --- uploads ---------------------------------------------------------------------------------


@pytest.mark.trust("Uploads", "larger than the limit")
def test_a_file_over_the_limit(address):
    response = upload(address, bytes(2**20 + 1))
    assert response.status_code == 413 and "Traceback" not in response.text
    assert upload(address, picture_file()).status_code == 200


def multipart(name: str, size: int, filename: str = ""):
    """The pieces of a body whose length nobody announces."""
    yield f'--x\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode()
    for _ in range(size // 2**16):
        yield b"a" * 2**16


@pytest.mark.parametrize(
    ("path", "kind", "size"),
    [
        ("/gradio_api/upload", "multipart/form-data; boundary=x", (FILES_AT_ONCE + 3) * 2**20),
        ("/gradio_api/queue/join", "application/json", TEXT_BYTES + 2**20),
        ("/gradio_api/call/chat", "application/json", TEXT_BYTES + 2**20),
        ("/login", "application/x-www-form-urlencoded", TEXT_BYTES + 2**20),
    ],
)
@pytest.mark.trust("Uploads", "larger than the limit")
def test_bodies_without_end(address, path, kind, size):
    """A form's field, or JSON, of any length: gradio itself would take it into memory."""
    memory = psutil.Process().memory_info().rss
    try:
        response = web.post(
            address + path,
            content=multipart("field", size),
            headers={"content-type": kind},
            timeout=120,
        )
    except (httpx.WriteError, httpx.RemoteProtocolError):  # it hung up amid our sending
        pass
    else:
        assert response.status_code in (400, 404, 405, 413, 422), response.text
    assert psutil.Process().memory_info().rss - memory < 200 * 2**20
    announced = httpx.Request("POST", address + path, content=b"")
    announced.headers["content-length"] = str(10**12)
    with connect(address) as line:
        line.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {10**12}\r\n\r\n".encode()
        )
        assert line.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", ["/v1/models", "/", "", "/gradio_api/deep_link"])
def test_a_whole_address_is_asked_for(address, path):
    """As clients ask a proxy."""
    expected = web.get(address + path).status_code
    for scheme in ("http", "HTTPS"):
        with connect(address) as line:
            line.sendall(f"GET {scheme}://a.b:1{path} HTTP/1.1\r\nHost: a.b:1\r\n\r\n".encode())
            assert line.recv(100).startswith(b"HTTP/1.1 %d" % expected)


def run_limits(app, receive, seconds: float, headers=()) -> list[dict]:
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload"}
    scope["headers"] = [*headers]
    asyncio.run(Limits(app, 1000, seconds)(scope, receive, send))
    return sent


@pytest.mark.trust("Uploads", "cut off or dribbled")
def test_a_dribbled_body_has_an_end():
    """A byte now and then, for as long as the server listens."""

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def read_all(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass

    start = time.monotonic()
    sent = run_limits(read_all, receive, 0.3)
    assert sent[0]["status"] == 408 and 0.2 < time.monotonic() - start < 10


@pytest.mark.parametrize("size", [0, 1, 10, 5000])
@pytest.mark.trust("Uploads", "cut off or dribbled")
def test_a_cut_upload_is_swept_away(address, size):
    folder = Path(get_upload_folder())
    before = {*folder.rglob("*")}
    with connect(address) as line:
        head = b"".join(multipart("files", 0, '; filename="a.png"'))
        line.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + head + b"a" * size
        )
        time.sleep(0.3)
    time.sleep(0.3)
    left = {*folder.rglob("*")} - before
    for path in left:
        os.utime(path, (time.time() - CUT_SECONDS - 5,) * 2)
    sweep(folder)
    assert not {*folder.rglob("*")} - before


def test_the_sweeper_leaves_what_is_in_use(tmp_path):
    """What is a day old goes, but for the page's own files; what was cut goes sooner."""
    old, older = time.time() - CUT_SECONDS - 5, time.time() - KEPT_SECONDS - 5
    for name, written in ("tmpcut", old), ("a/kept.png", old), ("b/dead.png", older):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (written, written))
    pictures = in_folder(tmp_path)
    for path in pictures:  # as copies of files that were installed long ago
        os.utime(path, (older, older))
    sweep(tmp_path, pictures)
    left = {str(path) for path in tmp_path.rglob("*.*")}
    assert left == {str(tmp_path / "a/kept.png"), *pictures} and len(pictures) == len(EXAMPLES)
    assert not (tmp_path / "b").exists() and not (tmp_path / "tmpcut").exists()


def test_a_full_disk_keeps_no_server_from_starting_and_ending(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    before = in_folder(tmp_path)
    (shown := Path(min(before))).unlink()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gradio.processing_utils.tempfile.mkstemp", full)
    app = SimpleNamespace(get_blocks=lambda: SimpleNamespace(temp_file_sets=[]))

    async def run() -> None:
        async with uploads.sweeping(app, in_folder):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert in_folder(tmp_path) == before - {str(shown)}
    assert "Traceback" not in caplog.text and "No space left" in caplog.records[-1].getMessage()


def test_sweeping_goes_on_and_ends_clean(tmp_path, monkeypatch):
    """While files come; at the end its visitors' go, not what another page shows as well."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "EVERY_SECONDS", 0.01)
    uploaded, other = tmp_path / "a/one.png", tmp_path / "b/other.png"
    for path in (uploaded, other):
        path.parent.mkdir()
        path.write_bytes(b"x")
    pictures = in_folder(tmp_path)
    files = {str(uploaded), *pictures}
    page = SimpleNamespace(temp_file_sets=[files])
    app = SimpleNamespace(get_blocks=lambda: page)

    async def run() -> None:
        async with uploads.sweeping(app, in_folder):
            for number in range(3000):
                files.add(f"{tmp_path}/gone/{number}.png")
                if not number % 300:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            assert files == {str(uploaded), *pictures}

    asyncio.run(run())
    assert not uploaded.exists() and other.exists() and all(map(os.path.exists, pictures))


@pytest.mark.parametrize(
    "name",
    ["../../../../evil.png", "a\0b.png", "x" * 4096 + ".png", "<img src=x onerror=alert(1)>.png"]
    + ["/etc/passwd", "..", "con\r\nX-Evil: 1.png"],
    ids=lambda name: repr(name[:8]),
)
@pytest.mark.trust("Uploads", "hostile file names")
def test_names_of_uploads(address, name):
    """Wherever it is stored, it is in the folder; it can be asked about, or is refused plainly."""
    response = upload(address, picture_file(), name)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 200:
        [path] = response.json()
        folder = Path(get_upload_folder()).resolve()
        assert Path(path).resolve().is_relative_to(folder) and len(Path(path).name) < 256
        assert "x-evil" not in response.headers
        said = call_chat(address, {"path": path, "orig_name": name, **FILE})
        assert "event: complete" in said
    assert not Path("/evil.png").exists()


@pytest.mark.trust("Protocol", "deep JSON; too many parts and headers")
def test_too_many_parts_and_headers(address):
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nc\r\n'
    many = {"content-type": "multipart/form-data; boundary=x"}
    response = web.post(
        address + "/gradio_api/upload", content=part * 1500 + b"--x--\r\n", headers=many, timeout=60
    )
    assert response.status_code in (400, 413)
    long = b'--x\r\nContent-Disposition: form-data; name="a"\r\nX: ' + b"y" * 20_000 + b"\r\n\r\n"
    response = web.post(address + "/gradio_api/upload", content=long, headers=many)
    assert response.status_code in (400, 413)
    for headers in ({f"x-{i}": "y" * 1000 for i in range(2000)}, {"x": "y" * 10**6}):
        try:
            status = web.get(address + "/healthz", headers=headers).status_code
        except httpx.TransportError:  # it hung up
            status = 431
        assert 400 <= status < 500


# --- the page's own protocol ----------------------------------------------------------------------


def call_chat(address, image=None, **more) -> str:
    """All that is said on a call of /chat."""
    sent = {"data": ["What is this?", image, None, None, 0, 1.0, 5, *[None] * 3], **more}
    called = web.post(address + "/gradio_api/call/chat", json=sent, timeout=60)
    assert called.status_code == 200, called.text
    url = f"{address}/gradio_api/call/chat/{called.json()['event_id']}"
    return web.get(url, timeout=120).text


@pytest.fixture(scope="module")
def events(address) -> dict[str, int]:
    return page_events(address)


def stop(address, events, session: str) -> None:
    """As the page's button does it."""
    sent = {"data": [None], "fn_index": events["stop"], "session_hash": session}
    assert web.post(address + "/gradio_api/run/predict", json=sent).status_code == 200


PRIVATE = "the file of another"


@pytest.mark.parametrize("meta", [FILE, {}, {"meta": {"_type": "x"}}], ids=["meta", "none", "odd"])
@pytest.mark.parametrize("event", ["ask", "attach", "open", "example"])
@pytest.mark.trust("Protocol", "another session's files, and the machine's own")
def test_no_file_of_this_machine_through_the_page(address, events, tmp_path, event, meta):
    """A replayed event that names a file which was never uploaded: nothing of it is shown."""
    secret = f"private-{event}-{len(meta)}-{id(meta)}"
    path = tmp_path / f"{secret}.png"
    path.write_bytes(picture_file("magenta"))
    (tmp_path / f"{secret}.json").write_text(json.dumps({"format": PRIVATE}))
    file = {"path": str(path), **meta}
    box = {"text": "What is this?", "files": [file]}
    data = {
        "ask": [box, None, *SETTINGS],
        "attach": [box, None],
        "open": [{"path": str(tmp_path / f"{secret}.json"), **meta}, None],
        "example": [None, *SETTINGS],
    }[event]
    example = {"value": {"text": "x", "files": [file]}, "index": 0}
    last = page_event(address, events[event], data, secret, example if event == "example" else None)
    said = json.dumps(last)
    assert PRIVATE not in said
    copies = [p for p in Path(get_upload_folder()).rglob(f"{secret}*")]
    assert not copies, f"{event}: taken into the folder that is served"


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd"])
@pytest.mark.trust("Protocol", "another session's files, and the machine's own")
def test_no_file_of_this_machine_is_served(address, path):
    for start in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy="):
        response = web.get(address + start + path)
        assert 400 <= response.status_code < 500 and "root:" not in response.text
    assert "event: error" in call_chat(address, {"path": path, **FILE})


@pytest.mark.trust("Protocol", "another session's files, and the machine's own")
def test_another_sessions_upload_has_a_name_that_nobody_guesses(address):
    """The address of a file is the hash of its content: who knows that has the file."""
    [path] = upload(address, picture_file("olive")).json()
    assert len(Path(path).parent.name) >= 40
    nearby = Path(path).parent.parent / ("0" * 64) / "a.png"
    assert web.get(f"{address}/gradio_api/file={nearby}").status_code in (403, 404)
    assert web.get(f"{address}/gradio_api/file={Path(path).parent}").status_code in (403, 404)


CLOSED = ["process_recording", "deep_link?session_hash=x", "component_server", "vibe-edit/"]
CLOSED += ["run-history/connect", "stream/x", "proxy=http://127.0.0.1:9/", "dev/reload"]


@pytest.mark.parametrize("path", [*CLOSED, "process_recording/", "%70rocess_recording"])
@pytest.mark.trust("Protocol", "the routes of Gradio that the page does not need")
def test_what_the_page_does_not_need_is_closed(address, path):
    """Gradio starts ffmpeg, writes conversations to the disk, fetches: not here."""
    for url in (f"{address}/gradio_api/{path}", f"{address}//gradio_api//{path}"):
        for method in ("GET", "POST", "HEAD"):
            assert web.request(method, url, content=b"x").status_code in (404, 405)
    for url in ("/monitoring", "/monitoring/summary", "/monitoring/x"):
        assert web.get(address + url).status_code == 404


OUT_OF_ORDER = [
    ("stop", [None], None),
    ("undo", [None, None, None], None),
    ("retry", [None, *SETTINGS], None),
    ("option", [None, *SETTINGS], {"index": 0, "value": "continue"}),
    ("edit", [None, *SETTINGS], {"index": 99, "value": "x", "previous_value": "y"}),
    ("edit", [None, *SETTINGS], {"index": -1, "value": "x", "previous_value": "y"}),
    ("edit", [None, *SETTINGS], {"index": "x", "value": 3, "previous_value": None}),
    ("attach", [box("Hi"), "x"], None),
    ("reopen", [None], {"index": 0, "value": {"data": {"format": 1}, "name": 3}}),
    ("reopen", [None], {"index": 0, "value": "x"}),
    ("show_version", [10**9, None], None),
    ("choose_preset", ["x"], None),
    ("retry", ["session", *SETTINGS], None),
    ("ask", [{"text": "Hi", "files": []}, None, *["x"] * 8], None),
    ("ask", [{"text": "Hi", "files": []}, None, float("inf"), *SETTINGS[1:]], None),
    ("ask", [{"text": "Hi", "files": []}, None, float("nan"), *SETTINGS[1:]], None),
    ("ask", [{"text": "Hi", "files": []}, None, *SETTINGS[:5], "9" * 5000, "", None], None),
    ("ask", [{"text": "Hi", "files": []}], None),
    ("ask", ["Hi", None, *SETTINGS], None),
    ("ask", [None, None, *SETTINGS], None),
    ("ask", {"0": 1}, None),
]


@pytest.mark.parametrize("number", range(len(OUT_OF_ORDER)))
@pytest.mark.trust("Protocol", "events out of order, replays, unknown sessions")
def test_events_that_make_no_sense(address, events, number):
    """Each is answered; what it meant is not done; no library's words come back."""
    name, data, event_data = OUT_OF_ORDER[number]
    session = f"odd-{number}"
    if isinstance(data, list):
        last = page_event(address, events[name], data, session, event_data)
        assert last is not None
        said = json.dumps(last)
        assert not any(bad in said for bad in ("Traceback", "site-packages", " object at 0x"))
    else:
        assert join(address, events[name], data, session, event_data).status_code == 422
    assert saved(address, events, session) is None


@pytest.mark.trust("Protocol", "another session's conversation")
def test_another_sessions_conversation(address, events):
    """No event of one page gives away, or changes, what was said on another."""
    ask_data = [box("nonce4711x"), None, *SETTINGS]
    assert page_event(address, events["ask"], ask_data, "first")["success"]
    before = saved(address, events, "first")
    assert "nonce4711x" in before
    for state in (None, "first", {"session_hash": "first"}, 1):
        for name in ("save", "record", "record_left", "renew"):
            assert join(address, events[name], [state], "second").is_success
        assert join(address, events["undo"], [None, state, None], "second").is_success
        data = [state, *SETTINGS]
        assert join(address, events["retry"], data, "second").is_success
        assert join(address, events["ask"], [box("Mine?"), *data], "second").is_success
        assert "nonce4711x" not in str([*page_messages(address, "second")])
    assert saved(address, events, "first") == before


@pytest.mark.trust(
    "Load and interruptions", "slow readers, readers that stop, a page that never listens"
)
def test_what_nobody_listens_to_has_an_end(address, events):
    """Each event leaves what it has to say with the server, until the page has read it."""
    statuses = [join(address, events["renew"], [None], "deaf").status_code for _ in range(40)]
    assert statuses == [200] * MAX_UNREAD_EVENTS + [429] * (40 - MAX_UNREAD_EVENTS)
    assert (
        len([m for m in page_messages(address, "deaf") if m["msg"] == "process_completed"])
        == MAX_UNREAD_EVENTS
    )
    assert join(address, events["renew"], [None], "deaf").status_code == 200


def test_many_events_make_the_next_no_slower(address, events, monkeypatch):
    """Gradio counts what it did, though nobody sees it: a table of 10,000 events each time."""
    counted = []
    monkeypatch.setattr(Queue, "compute_analytics_summary", lambda _, all: counted.append(len(all)))
    for _ in range(3):
        page_event(address, events["renew"], [None], "many")
    wait_for(lambda: counted == [1, 1, 1])


@pytest.mark.trust("Protocol", "events out of order, replays, unknown sessions")
def test_unknown_sessions_events_and_replays(address):
    unknown = web.get(address + "/gradio_api/queue/data?session_hash=nobody", timeout=60)
    assert "not_found" in unknown.text or unknown.status_code == 404
    for event in ("nothing", "../x", "0" * 4000):
        body = {"session_hash": "nobody", "fn_index": 0, "event_id": event}
        assert web.post(address + "/gradio_api/cancel", json=body).status_code < 500
    assert web.post(address + "/gradio_api/reset", json={"event_id": "x"}).status_code < 500
    body = {"session_hash": "nobody", "fn_index": 9999, "data": []}
    joined = web.post(address + "/gradio_api/queue/join", json=body)
    assert joined.status_code == 404 and "no such event" in joined.text
    called = web.post(address + "/gradio_api/call/chat", json={"data": ["Hi"] + [None] * 9})
    url = f"{address}/gradio_api/call/chat/{called.json()['event_id']}"
    assert "event: complete" in web.get(url, timeout=60).text
    try:
        again = web.get(url, timeout=3).text
    except httpx.ReadTimeout:  # nothing is said of it
        again = ""
    assert "event: complete" not in again


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"data":' * 50_000, b"\xff", b"{}", b"[]"])
@pytest.mark.parametrize("path", ["queue/join", "call/chat", "cancel", "reset"])
@pytest.mark.trust("Protocol", "deep JSON; too many parts and headers")
def test_json_that_is_none_or_too_deep(address, path, body):
    headers = {"content-type": "application/json"}
    url = f"{address}/gradio_api/{path}"
    response = web.post(url, content=body, headers=headers, timeout=60)
    assert 400 <= response.status_code < 500 and len(response.text) < 2000


@pytest.mark.parametrize("depth", [100, 300, 600, 900])
@pytest.mark.trust("Protocol", "deep JSON; too many parts and headers")
def test_json_that_is_deep(address, events, depth):
    """As deep as Python reads it: answered, or refused."""
    data = "[" * depth + "]" * depth
    content = f'{{"data": [{data}], "fn_index": {events["renew"]}, "session_hash": "{depth}"}}'
    joined = web.post(
        address + "/gradio_api/queue/join",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert joined.status_code in (200, 400, 422) and len(joined.text) < 9000, joined.text


def test_the_answer_to_a_body_that_is_not_read_arrives(address):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for _ in range(20):
        content = b"--x\r\n" + b"a" * 500_000
        response = web.post(address + "/gradio_api/upload", headers=headers, content=content)
        assert 400 <= response.status_code < 500


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/chat/completions", 413),
        ("/v1/nope", 404),
        ("/v1/models", 405),
        ("/gradio_api/queue/join", 413),
    ],
)
def test_a_refusal_arrives_at_who_sends_first_and_reads_then(address, path, status):
    body = b" " * (TEXT_BYTES + 2**23)
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(address + path, body, JSON), timeout=60)
    with refused.value as response:
        assert response.code == status and response.read()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nope", "/gradio_api/queue/join"])
def test_who_asks_whether_to_send_is_refused_unsent(address, path):
    with connect(address) as line:
        line.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {10**9}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert line.recv(100).startswith(b"HTTP/1.1 4")


def test_who_was_told_to_send_is_read_to_the_end():
    parts = [{"type": "http.request", "body": b"a", "more_body": more} for more in (True, False)]

    async def receive():
        return parts.pop(0)

    async def refuse(scope, receive, send):
        await receive()
        await PlainTextResponse("No.", 400)(scope, receive, send)

    assert run_limits(refuse, receive, 5, [(b"expect", b"100-continue")])[0]["status"] == 400
    assert not parts


def test_no_websockets(address, caplog):
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    with connect(address) as line:
        line.sendall(
            b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b" 101 " not in line.recv(100)
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
    assert httpx.get(address + "/healthz", headers=upgrade).status_code == 200
    logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data/", "http://localhost:7860/", "http://[::1]/a.png"]
    + ["http://0x7f000001/", "http://127.1/", "file:///etc/passwd", "ftp://127.0.0.1/"]
    + ["http://images.example.org@127.0.0.1/", "//127.0.0.1/a.png", "http://127.0.0.1:port/"],
)
@pytest.mark.trust("Protocol", "addresses of other machines, redirects, `file:`")
def test_no_address_is_asked_for(address, url, monkeypatch):
    """Without --image-hosts no connection is made, whatever is named; redirects: test_image_url."""
    asked = []
    monkeypatch.setattr(httpx.AsyncClient, "stream", lambda *a, **k: asked.append(a))
    response = ask(address, "What?", url)
    assert response.status_code == 400 and not asked
    assert "event: error" in call_chat(address, {"path": url, "url": url, **FILE})


# --- readers ---------------------------------------------------------------------------------


def stream_request(text: str, tokens: int, **settings) -> bytes:
    body = {"messages": [question(text)], "max_tokens": tokens, "stream": True, **settings}
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content)
    ) + content


@pytest.mark.trust(
    "Load and interruptions", "slow readers, readers that stop, a page that never listens"
)
def test_readers_that_stop_reading(address, engine):
    """Their answers are computed, wait for them, and hold up nobody."""
    lines = [connect(address) for _ in range(8)]
    for line in lines:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.sendall(stream_request("Hello?", 300))
        line.recv(10)
    assert ask(address, "What about me?").status_code == 200
    assert at_rest(engine, 60)  # their places are free, though they never read
    for line in lines:
        line.close()


@pytest.mark.trust(
    "Load and interruptions", "slow readers, readers that stop, a page that never listens"
)
def test_a_slow_reader_gets_everything(address, engine):
    whole = text_of(ask(address, "Hello?", max_tokens=40))
    with connect(address) as line:
        line.sendall(stream_request("Hello?", 40, temperature=0))
        said = b""
        while b"[DONE]" not in said:
            said += line.recv(200)
            time.sleep(0.005)
    chunks = [json.loads(part)["choices"][0] for part in re.findall(rb"data: (\{.*\})", said)]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == whole != ""
    assert chunks[-1]["finish_reason"] and len(chunks) > 2


@pytest.mark.trust(
    "Load and interruptions", "storms of connections, a full queue, probes meanwhile"
)
def test_a_storm_of_connections(address):
    """300 that come and go, with nothing, half a line or half a request; none stays open."""
    handles = psutil.Process().num_fds()

    def come_and_go(number):
        with connect(address) as line:
            line.sendall(
                [b"", b"GET / HT", stream_request("Hi", 100)[:-9], b"\x16\x03\1"][number % 4]
            )

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(come_and_go, range(300)))
    wait_for(lambda: psutil.Process().num_fds() <= handles + 10)  # no connections are left


@pytest.mark.trust(
    "Load and interruptions", "storms of connections, a full queue, probes meanwhile"
)
def test_probes_while_the_queue_is_full(address, engine, monkeypatch):
    monkeypatch.setattr(Engine, "most", 0)
    engine.pace = 0.02
    assert ask(address, "Hello?").status_code == 429
    assert web.get(address + "/healthz", timeout=60).status_code == 200
    assert web.get(address + "/metrics", timeout=60).status_code == 200
    assert web.get(address + "/readyz", timeout=60).status_code == 200


@pytest.mark.trust("Load and interruptions", "Stop while streaming and while queued")
def test_closing_while_queued(address, engine, monkeypatch):
    """Who leaves before it is his turn leaves the queue."""
    monkeypatch.setattr(engine, "max_running", 1)
    engine.pace = 0.05
    lines = [connect(address) for _ in range(3)]
    for line in lines:
        line.sendall(stream_request("Hello?", 500))
    wait_for(lambda: engine.waiting == 2)
    for line in lines:
        line.close()
    assert at_rest(engine, 30)


@pytest.mark.trust("Load and interruptions", "Stop while streaming and while queued")
@pytest.mark.trust(
    "Load and interruptions", "storms of connections, a full queue, probes meanwhile"
)
def test_nothing_stands_behind_the_answers(address, engine, events, monkeypatch):
    """41 questions on the page, one more than Gradio has workers by default: the next one is told
    that there are too many, New chat works, and so does Stop, also in the queue."""
    monkeypatch.setattr(engine, "max_running", 1)
    monkeypatch.setattr(engine, "max_waiting", 40)
    monkeypatch.setattr(session_module, "SECONDS_PER_LOOK", 60)  # each look costs the page a while
    engine.pace = 0.2
    sessions = [f"slow-{n}" for n in range(41)]
    settings = [*SETTINGS[:3], 300, *SETTINGS[4:]]
    for session in sessions:
        assert join(address, events["ask"], [box("Hello?"), None, *settings], session).is_success
    wait_for(lambda: (engine.running, engine.waiting) == (1, 40))
    assert join(address, events["ask"], [box("Me?"), None, *settings], "late").is_success
    assert "Too many people" in str([*page_messages(address, "late", 20)])
    assert page_event(address, events["new_chat"], [None], "new", seconds=20)["success"]
    stop(address, events, sessions[40])
    wait_for(lambda: engine.waiting == 39)
    for session in sessions:
        stop(address, events, session)
    assert at_rest(engine, 20)


@pytest.mark.trust("Load and interruptions", "a tab that is closed")
def test_a_tab_that_is_closed(address, engine, events, monkeypatch):
    """While it waits, while it is answered: the answer ends, and the session can ask again."""
    monkeypatch.setattr(engine, "max_running", 1)
    monkeypatch.setattr(session_module, "SECONDS_PER_LOOK", 0.1)
    engine.pace = 0.02
    tabs = {}
    for session in ("answered", "queued"):
        data = [box("Hello?"), None, *SETTINGS[:3], 500, *SETTINGS[4:]]
        assert join(address, events["ask"], data, session).is_success
        tabs[session] = page_messages(address, session, 20)
        while next(tabs[session])["msg"] != "process_generating":
            pass
    assert (engine.running, engine.waiting) == (1, 1)
    tabs["queued"].close()
    wait_for(lambda: not engine.waiting)
    assert engine.running == 1
    tabs["answered"].close()
    assert at_rest(engine, 20)
    for session in tabs:
        join(address, events["ask"], [box("Again?"), None, *SETTINGS], session)
        said, tabs[session] = "", page_messages(address, session, 20)
        while "process_completed" not in said:
            said = str(next(tabs[session]))
            assert "stop it first" not in said
        assert verbatim("Again?") in said


# --- faults that are not the engine's -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [(RuntimeError, 500, "went wrong"), (MemoryError, 503, "not enough memory")],
)
@pytest.mark.trust(
    "Faults", "exception, memory or hang in the tokenizer (a hang has no limit: see below)"
)
def test_a_tokenizer_that_fails(address, engine, kind, status, says, monkeypatch, caplog):
    """At the question, and at the answer: that one is told, in a sentence."""

    def fail(*_, **__):
        raise kind("out of cheese")

    for owner, name in (chat, "encode_chat"), (engine.model.tokenizer, "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            response = ask(address, "Hello?")
            assert response.status_code == status and says in response.text
            streamed = ask(address, "Hello?", stream=True).text
            assert says in streamed and "[DONE]" not in streamed
            said = call_chat(address)
            assert "event: error" in said
            assert "cheese" not in response.text + streamed + said
        assert at_rest(engine) and ask(address, "Hello?").status_code == 200
    assert "cheese" in caplog.text


@pytest.mark.trust(
    "Faults", "exception, memory or hang in the tokenizer (a hang has no limit: see below)"
)
def test_a_tokenizer_that_hangs(address, monkeypatch):
    """It holds up the one who asked."""
    encode, released = chat.encode_chat, threading.Event()

    def hang(messages, *others):
        if "hang" in str(messages):
            released.wait(60)
        return encode(messages, *others)

    monkeypatch.setattr(chat, "encode_chat", hang)
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(ask, address, "hang, please")
        time.sleep(0.3)
        assert ask(address, "Hello?").status_code == 200 and not hung.done()
        released.set()
        assert hung.result().status_code == 200


@pytest.mark.trust("Faults", "exception, memory, NaN or hang in the encoder")
def test_an_encoder_that_hangs(address, engine, monkeypatch):
    """Whoever asks is told; when it comes back, the next one is answered."""
    embed, released = engine.model.encode_pictures, threading.Event()

    def hang(pictures):
        released.wait(30)
        return embed(pictures)

    monkeypatch.setattr(engine, "_hang_seconds", 0.4)
    monkeypatch.setattr(engine.model, "encode_pictures", hang)
    response = ask(address, "What is this?", data_url(picture_file("lime")))
    assert response.status_code == 503 and "stopped responding" in response.text
    released.set()
    wait_for(lambda: not engine.fault)
    assert ask(address, "What is this?", data_url(picture_file("lime"))).status_code == 200


# --- isolation -------------------------------------------------------------------------------


@pytest.mark.trust(
    "Isolation", "32 conversations at once answer as each alone, over HTTP and in the engine"
)
def test_thirty_two_at_once_over_http(address, engine, monkeypatch):
    """Each with a word and a picture of its own, in the engine at the same time: each answer is the
    one that an engine without company and without anything to reuse gives, and nobody else's."""
    real, before, at_once = engine.decoder.forward, engine.totals.requests, []

    def once_all_are_there(rows):
        until(lambda: engine.totals.requests >= before + 32)
        at_once.append(len(rows.tables))
        return real(rows)

    monkeypatch.setattr(engine.decoder, "forward", once_all_are_there)
    pictures = [picture_file(f"rgb({8 * n}, {255 - 7 * n}, {40 * n % 256})") for n in range(32)]
    texts = [f"nonce{n}x: what is it?" for n in range(32)]

    def in_the_crowd(text, content) -> tuple[str, list[float]]:
        response = ask(address, text, data_url(content), logprobs=True)
        tokens = response.json()["choices"][0]["logprobs"]["content"]
        return text_of(response), [token["logprob"] for token in tokens]

    with ThreadPoolExecutor(32) as pool:
        together = [*pool.map(in_the_crowd, texts, pictures)]
    monkeypatch.undo()
    assert max(at_once) > 8
    other = Engine(engine.model)
    sampling = default_sampling(engine.model.config, temperature=0, max_new_tokens=8)
    for text, content, (said, logprobs) in zip(texts, pictures, together, strict=True):
        conversation = chat.Conversation.asking(text, [image.load(content)])
        alone = chat.ask(other, conversation, sampling, logprobs=True)
        assert "".join(alone) == said and logprobs == pytest.approx(alone.logprobs, abs=1e-3)
    other.close()
    for (_, one), (_, another) in combinations(together, 2):
        assert one != pytest.approx(another, abs=1e-2)  # or nobody would notice a swap
