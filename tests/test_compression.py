"""The page and its assets: compressed, cached, without unused libraries."""

import re

import gradio as gr
from fastapi import FastAPI
from starlette.testclient import TestClient

from minigpt4.web.guard import compression
from minigpt4.web.guard.compression import FRONTEND, UNUSED, Compression
from minigpt4.web.page.page import LOOK, build_page
from tests.fake_engine import FakeEngine


def test_the_page_is_compressed_and_brings_nothing_unused():
    app = gr.mount_gradio_app(FastAPI(), build_page(FakeEngine()), "/", **LOOK)
    client = TestClient(Compression(app))
    with client.stream("GET", "/", headers={"accept-encoding": "gzip"}) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert len(b"".join(response.iter_raw())) < 64_000
    plain = client.get("/", headers={"accept-encoding": "gzip;q=0.0, identity"})
    assert "content-encoding" not in plain.headers and "MiniGPT-4" in plain.text
    assert "page_step_" not in plain.text  # a text that only the server says

    (unused,) = FRONTEND.glob("hls-*.js")
    assert UNUSED.fullmatch(unused.name)
    stub = client.get(f"/assets/{unused.name}")
    assert len(stub.content) < 200
    names = {name for file in FRONTEND.glob("*.js") for name in _imported(file, unused.name)}
    assert names and all(f"as {name}" in stub.text for name in names)
    assert client.get("/assets/hls-none.js").status_code == 404
    kept = compression._compressed.cache_info().currsize
    assert client.get("/assets/none-12345678.js").status_code == 404
    assert client.get(f"/elsewhere/assets/{unused.name}").status_code == 404
    assert (
        compression._compressed.cache_info().currsize == kept
    )  # nothing of names that there are not


def test_assets_are_compressed_and_kept():
    app = gr.mount_gradio_app(FastAPI(), build_page(FakeEngine()), "/", **LOOK)
    client = TestClient(Compression(app))
    for path in re.findall(r"\./assets/[\w.-]+\.(?:js|css)", client.get("/").text):
        file = FRONTEND / path.rpartition("/")[2]
        kept = client.get(path)
        assert kept.headers["content-encoding"] == "gzip" and kept.content == file.read_bytes()
        assert "immutable" in kept.headers["cache-control"]
        plain = client.get(path, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers and plain.content == kept.content
        assert kept.headers["content-type"].startswith(("text/javascript", "text/css"))


def _imported(file, name) -> list[str]:
    text = file.read_text(encoding="utf-8")
    found = re.search(r'import\{([^}]*)\}from"\./' + re.escape(name), text)
    return re.findall(r"(\w+) as", found[1]) if found else []
