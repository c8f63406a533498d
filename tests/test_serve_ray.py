"""Replicas of nano on a real Ray cluster: `make test-ray` installs Ray and runs this."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import httpx
import psutil
import pytest
import torch

pytest.importorskip("ray.serve", reason="make test-ray installs Ray")

from minigpt4.config import get_model
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.model import image
from minigpt4.start import quantize_of
from minigpt4.weights.load import find_weights, load_model
from tests.api_case import client, data_url, free_port, question
from tests.running import responds, wait_for

ROOT = Path(__file__).parent.parent
BEAST = (resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg").read_bytes()
OPTIONS = {
    "model": "nano",
    "cpus": 1,
    "max_replicas": 2,
    "max_running": 8,
    "target": 2,
    "upscale_seconds": 0.5,
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """`serve run` as the docs have it, with one replica at first."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "minigpt4",
                "route_prefix": "/",
                "import_path": "minigpt4.remote.ray:app",
                "args": OPTIONS,
            }
        ],
    }
    folder = tmp_path_factory.mktemp("serve")
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("serve"),
                "run",
                "--app-dir",
                ROOT,
                folder / "config.yaml",
            ],
            cwd=ROOT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "MINIGPT4_API_KEY": "sesame"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: responds(address + "/readyz") or process.poll() is not None, 300)
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            yield address
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                _, left = psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=60)
                for one in left:
                    one.kill()
            process.wait()


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith("ray::ServeReplica:minigpt4:Replica"):
            found.append(process)
    return found


def seconds_of_work(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def ask_there(address: str, *messages, stream: bool = False, tokens: int = 40):
    return client(address, "sesame", timeout=180).chat.completions.create(
        model="nano",
        messages=list(messages),
        max_tokens=tokens,
        temperature=0,
        stream=stream,
        extra_body={"repetition_penalty": 1.1},
    )


def text_of(chunk) -> str:
    return chunk.choices[0].delta.content or ""


def test_an_answer_equals_a_local_one(address):
    assert httpx.get(address + "/v1/models").status_code == 401
    config = get_model("nano")
    files = find_weights(config)
    quantize = quantize_of("auto", config, torch.device("cpu"))
    engine = Engine(load_model(config, files, quantize=quantize))
    asked = Conversation.asking("Describe this image in detail.", [image.load(BEAST)])
    sampling = Sampling(temperature=0.0, repetition_penalty=1.1, max_new_tokens=40)
    here = "".join(ask(engine, asked, sampling))
    engine.close()
    url = data_url(BEAST)
    there = ask_there(address, question("Describe this image in detail.", url))
    assert there.choices[0].message.content == here and here
    assert there.usage.prompt_tokens > 26


def test_the_queue_brings_another_replica(address):
    assert len(replicas()) == 1
    end = time.monotonic() + 180

    def keep_asking(visitor: int) -> int:
        answers = 0
        while len(replicas()) == 1:
            assert time.monotonic() < end, "no replica was added"
            assert ask_there(address, question(f"Write about lake {visitor}."), tokens=60).choices
            answers += 1
        return answers

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(keep_asking, range(8))) >= 8
    assert 'minigpt4_errors_total{kind="broken"} 0' in metrics(address)


def metrics(address: str) -> str:
    headers = {"Authorization": "Bearer sesame"}
    return httpx.get(address + "/metrics", headers=headers).text


def test_a_conversation_stays_with_its_replica(address):
    """Which knows what was computed before; by chance all ten would be rare with two of them."""
    wait_for(_settled, 120)
    for i in range(10):
        first = question(f"What is {i}, and what are {i} things that people like?")
        answer = ask_there(address, first).choices[0].message.content
        said = {"role": "assistant", "content": answer}
        second = ask_there(address, first, said, question("And why?"), tokens=5)
        assert second.usage.prompt_tokens_details.cached_tokens >= 16


def _settled() -> bool:
    """Both replicas have loaded their models."""
    found = replicas()
    before = [seconds_of_work(p) for p in found]
    time.sleep(1)
    busy = [seconds_of_work(p) - b for p, b in zip(found, before, strict=True)]
    return len(found) == 2 and max(busy) < 0.3


def working_one() -> psutil.Process:
    found = replicas()
    before = {p: seconds_of_work(p) for p in found}
    time.sleep(0.4)
    return max(found, key=lambda p: seconds_of_work(p) - before[p])


def test_an_answer_goes_on_where_its_replica_was_killed(address):
    asked = question("Write a long story about a lake and a forest.")
    whole = ask_there(address, asked, tokens=500).choices[0].message.content
    pieces = iter(ask_there(address, asked, stream=True, tokens=500))
    text = "".join(text_of(next(pieces)) for _ in range(20))
    own = working_one()
    own.kill()
    own.wait(10)
    rest = [text_of(piece) for piece in pieces]
    assert text + "".join(rest) == whole and len(rest) > 20
    wait_for(lambda: len(replicas()) == 2, 120)  # Ray starts another one
    assert own.pid not in {p.pid for p in replicas()}


def test_closing_a_stream_ends_the_work(address):
    wait_for(_settled, 120)
    stream = ask_there(address, question("Write a very long story."), stream=True, tokens=1500)
    pieces = iter(stream)
    for _ in range(5):
        next(pieces)
    own = working_one()
    stream.close()
    time.sleep(1)
    before = seconds_of_work(own)
    time.sleep(1)
    assert seconds_of_work(own) - before < 0.5
    assert "minigpt4_active_chats 0" in metrics(address)
