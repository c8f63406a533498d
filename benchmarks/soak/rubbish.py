"""Malformed and hostile requests: each gets an answer that says so, or a closed door."""

import asyncio
import contextlib
import json
import random
import struct
import time
import zlib
from urllib.parse import urlsplit

import httpx

from benchmarks.soak.users import Ledger, body

FILE = {"meta": {"_type": "gradio.FileData"}}


def huge_png() -> bytes:
    """A picture that says it has 400 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def api_bodies(dice: random.Random) -> list[bytes]:
    """Bodies that the API refuses, each with a sentence."""
    return [
        b"{",
        b"[" * 50_000,
        dice.randbytes(2000),
        json.dumps({"messages": [{"role": "user", "content": "x"}], "temperature": -1}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "x"}], "num_beams": 10**9}).encode(),
        b'{"messages": [], "top_p": NaN}',
        json.dumps(body("What?", huge_png())).encode(),
        json.dumps(body("What?", dice.randbytes(500))).encode(),
        json.dumps(body("word " * 30_000, None)).encode(),
        *(json.dumps(_linked(url)).encode() for url in LINKS),
    ]


LINKS = (
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost:22/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
)


def _linked(url: str) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


async def send_rubbish(
    client: httpx.AsyncClient, address: str, dice: random.Random, ledger: Ledger
) -> None:
    """One piece of it. Whatever is answered must be no success and no fault of the server's."""
    doing = dice.choice([_api, _api, _api, _upload, _foreign_file, _queue, _cut_upload, _storm])
    try:
        statuses = await doing(client, address, dice)
    except httpx.TransportError as error:
        raise type(error)(f"{doing.__name__}: {error}", request=error.request) from error
    ledger.outcomes["rubbish"] += 1
    for status in statuses:
        good = 400 <= status < 500 or status == 503
        if not good and time.monotonic() > ledger.fault_until:
            ledger.outcomes["rubbish answered wrongly"] += 1
            ledger.wrong.append(f"{doing.__name__}: status {status}")


async def _api(client, address, dice) -> list[int]:
    response = await client.post("/v1/chat/completions", content=dice.choice(api_bodies(dice)))
    return [response.status_code]


async def _upload(client, address, dice) -> list[int]:
    """No multipart at all, one without a boundary, one that is too large."""
    headers, content = dice.choice(
        [
            ({"content-type": "multipart/form-data"}, b"x" * 1000),
            ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n" + b"a" * 20_000),
        ]
    )
    response = await client.post("/gradio_api/upload", headers=headers, content=content)
    return [response.status_code]


async def _foreign_file(client, address, dice) -> list[int]:
    """A file of the server's machine as a picture: the call is taken, its end is an error."""
    path = dice.choice(["/etc/passwd", "../../etc/passwd", "http://169.254.169.254/a.png", "a\0b"])
    called = await client.post(
        "/gradio_api/call/chat", json={"data": ["What?", {"path": path, **FILE}]}
    )
    if called.status_code != 200:
        return [called.status_code]
    event = called.json()["event_id"]
    said = (await client.get(f"/gradio_api/call/chat/{event}")).text
    return [400 if "event: error" in said else 200]


async def _queue(client, address, dice) -> list[int]:
    """Events that do not exist, of sessions that do not."""
    sent = dice.choice(
        [
            {"data": [], "fn_index": 9999, "session_hash": "nobody"},
            {"data": "x", "fn_index": 0, "session_hash": "nobody"},
            {"fn_index": "ask"},
        ]
    )
    response = await client.post("/gradio_api/queue/join", json=sent)
    other = await client.get("/gradio_api/file=/etc/passwd")
    closed = await client.post("/gradio_api/process_recording", content=b"x")
    return [response.status_code, other.status_code, closed.status_code]


async def _cut_upload(client, address, dice) -> list[int]:
    """Half of what was announced, a byte now and then, and away."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    with contextlib.suppress(ConnectionError):  # the server may close the door before
        for _ in range(dice.randrange(5)):
            writer.write(dice.randbytes(dice.choice([1, 9000])))
            await writer.drain()
            await asyncio.sleep(0.2)
    writer.close()
    return []


async def _storm(client, address, dice) -> list[int]:
    """Connections that say nothing, or half a line, and go."""
    parts = urlsplit(address)
    for _ in range(20):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(dice.choice([b"", b"GET / HT", b"\x16\x03\x01\x02\0"]))
        writer.close()
    return []
