"""A real server, nano, where its machine fails it: no home, no network, a full disk, a log that
cannot be written, SIGKILL."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from tests.api_case import data_url, free_port, page_event, picture_file, question
from tests.running import python, responds, wait_for
from tests.test_image import encoded

ROOT = Path(__file__).parent.parent
# Python runs this first: whatever is not on this machine cannot be reached, and is written down.
NO_NETWORK = """
import errno, os, sys

def watch(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple):
        host = given[1][0]
    elif event == "socket.getaddrinfo":
        host = given[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    if host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "None", ""):
        with open(os.environ["ASKED_FOR"], "a") as file:
            print(host, file=file)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

sys.addaudithook(watch)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits of a process")


class Server:
    """nano on a port of its own, without a home, without a network, its log on a full disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.asked_for = folder / "asked"
        (folder / "sitecustomize.py").write_text(NO_NETWORK)
        (folder / "uploads").mkdir()
        home = folder / "home"
        home.touch()  # a file: nothing can be made in it, whoever tries
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "ASKED_FOR": str(self.asked_for),
            "GRADIO_TEMP_DIR": str(folder / "uploads"),
            **dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), str(home)),
        }
        self.start()

    def start(self) -> None:
        with open("/dev/full", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "app.py", "--model", "nano", "--port", str(self.port)],
                cwd=ROOT,
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        ready = self.address + "/readyz"
        wait_for(lambda: responds(ready) or self.process.poll() is not None, 120)
        assert self.process.poll() is None

    def ask(self, text: str, *urls: str, **settings) -> dict:
        body = {"messages": [question(text, *urls)], "temperature": 0, "max_tokens": 8, **settings}
        response = httpx.post(self.address + "/v1/chat/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()

    def upload(self, content: bytes) -> httpx.Response:
        files = {"files": ("a.bmp", content, "image/bmp")}
        return httpx.post(self.address + "/gradio_api/upload", files=files, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("machine"))
    yield server
    server.process.kill()
    server.process.wait()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.mark.trust("Faults", "SIGKILL and restart on the same port; no writable home, no network")
def test_without_a_home_and_a_network(server):
    """It starts, answers about a picture, and has asked nobody for anything."""
    assert text_of(server.ask("What is this?", data_url(picture_file("teal"))))
    assert httpx.get(server.address, timeout=60).status_code == 200
    assert not server.asked_for.exists(), server.asked_for.read_text()


@pytest.mark.trust("Faults", "a log that cannot be written")
def test_an_error_that_cannot_be_logged(server):
    """Gradio writes a traceback before it answers; the visitor is told all the same."""
    config = httpx.get(server.address + "/config", timeout=60).json()
    event = next(d["id"] for d in config["dependencies"] if d["api_name"] == "ask")
    last = page_event(server.address, event, [{"text": 3, "files": 3}], "full", seconds=30)
    assert last["success"] is False


def test_weights_cannot_be_fetched_without_a_network(server, tmp_path):
    """One sentence, soon."""
    variables = server._environment | {"MINIGPT4_WEIGHTS": str(tmp_path)}
    done = python("-m", "minigpt4", "download", "vicuna-7b", status=2, seconds=120, **variables)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("minigpt4: ") and last.endswith(".")
    assert "Traceback" not in done.stderr
    server.asked_for.unlink()


@pytest.mark.trust("Faults", "a full disk")
def test_a_full_disk(server):
    """No file may grow beyond 64 kB: what is larger is refused in a sentence, all else works."""
    large = encoded(Image.new("RGB", (900, 900), "olive"), "BMP")
    process = psutil.Process(server.process.pid)
    _, most = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (2**16, most))
    try:
        refused = server.upload(large)
        assert refused.status_code == 507 and "disk is full" in refused.text
        assert "Traceback" not in refused.text
        assert text_of(server.ask("What is this?", data_url(picture_file("teal"))))
        assert server.upload(picture_file()).status_code == 200
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, most))
    assert server.upload(large).status_code == 200


@pytest.mark.trust("Faults", "a real model that repeats itself")
def test_a_model_that_repeats_itself(server):
    """Without its penalty it says the same again and again, up to the longest answer."""
    answer = server.ask(
        "Repeat for ever: ha ha ha ha ha ha", max_tokens=120, repetition_penalty=1.0
    )
    words = text_of(answer).split()
    assert answer["usage"]["completion_tokens"] == 120, text_of(answer)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len({*words}) < len(words) / 3, text_of(answer)  # it does repeat itself


@pytest.mark.trust("Faults", "SIGKILL and restart on the same port; no writable home, no network")
def test_killed_and_started_again(server):
    """In the middle of a stream: the port is free, the answers are what they were."""
    before = text_of(server.ask("What is this?", data_url(picture_file("navy"))))
    body = {"messages": [question("Write a long story.")], "max_tokens": 300, "stream": True}
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("POST", server.address + "/v1/chat/completions", json=body) as response,
    ):
        for _ in response.iter_bytes():
            server.process.kill()
    server.process.wait()
    server.start()
    assert text_of(server.ask("What is this?", data_url(picture_file("navy")))) == before
    assert server.upload(picture_file()).status_code == 200
