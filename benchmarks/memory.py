"""python -m benchmarks.memory: the server's memory, all of its processes together.

Starts app.py, then lets `--chats` visitors ask about a picture of their own at the same time, over
several turns, through the API. The resident memory of the server and its children is sampled
throughout. Linux only.

Prints one line of JSON, in MB of 10^6 bytes: at start (ready, nothing asked yet), at the peak, and
ten seconds after the last answer. RSS counts a page once for each process that maps it, so the sum
is an upper bound; PSS divides it by them, those of other programs included.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks import free_port

QUESTIONS = ("Describe this image in detail.", "What are the main colors?", "Write a short poem.")
SAMPLE_SECONDS = 0.2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.memory")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--chats", type=int, default=20, help="visitors at the same time")
    parser.add_argument("--rounds", type=int, default=2, help="visits, one group after the other")
    parser.add_argument("--tokens", type=int, default=120, help="longest answer")
    parser.add_argument("--side", type=int, default=2000, help="width of each picture in pixels")
    parser.add_argument("--parts", action="store_true", help="add a breakdown at the peak")
    options = parser.parse_args()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "app.py", "--model", options.model, "--port", str(port)],
        stdout=subprocess.DEVNULL,
    )
    try:
        print(json.dumps(measure(process, f"http://127.0.0.1:{port}", options)))
    finally:
        process.terminate()
        process.wait(30)


def measure(process: subprocess.Popen, address: str, options: argparse.Namespace) -> dict:
    """The figures of a server that has just been started."""
    _wait_until_ready(address)
    memory = Memory(process.pid)
    time.sleep(2)
    at_start = memory.now()
    tokens = 0
    started = time.monotonic()
    with memory, ThreadPoolExecutor(options.chats) as visitors:
        for first in range(0, options.rounds * options.chats, options.chats):
            seeds = range(first, first + options.chats)
            tokens += sum(visitors.map(lambda seed: visit(address, seed, options), seeds))
    seconds = time.monotonic() - started
    time.sleep(10)
    return {
        "model": options.model,
        "chats": options.chats,
        "pictures": options.rounds * options.chats,
        "turns": options.rounds * options.chats * len(QUESTIONS),
        "start_rss_mb": _mb(at_start["Rss"]),
        "peak_rss_mb": _mb(memory.peak["Rss"]),
        "after_rss_mb": _mb(memory.now()["Rss"]),
        "peak_pss_mb": _mb(memory.peak["Pss"]),
        "processes": len(memory.processes()),
        "tokens_per_s": round(tokens / seconds, 1),
    } | ({"parts": memory.parts} if options.parts else {})


def visit(address: str, seed: int, options: argparse.Namespace) -> int:
    """One visitor's conversation about a picture of random shapes; tokens generated."""
    url = "data:image/jpeg;base64," + base64.b64encode(_picture(seed, options.side)).decode()
    messages: list[dict] = []
    tokens = 0
    for number, question in enumerate(QUESTIONS):
        content: list[dict] = [{"type": "text", "text": question}]
        if number == 0:
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": "user", "content": content})
        body = {"model": options.model, "messages": messages, "max_tokens": options.tokens}
        reply = httpx.post(address + "/v1/chat/completions", json=body, timeout=600)
        reply.raise_for_status()
        answer = reply.json()
        tokens += answer["usage"]["completion_tokens"]
        messages.append(answer["choices"][0]["message"])
    return tokens


class Memory:
    """Samples the memory of a process and its descendants while it is used in `with`."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self.peak = {"Rss": 0, "Pss": 0}
        self.parts: dict[str, int] = {}

    def processes(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def now(self) -> dict[str, int]:
        """Bytes of all processes together, by the kernel's name."""
        server, *children = (_memory(process.pid) for process in self.processes())
        total = {
            name: server.get(name, 0) + sum(child.get(name, 0) for child in children)
            for name in self.peak
        }
        if total["Rss"] > self.peak["Rss"]:
            self.parts = {f"server {name}": _mb(count) for name, count in server.items() if count}
        self.peak = {name: max(self.peak[name], total[name]) for name in total}
        return total

    def __enter__(self) -> "Memory":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.now()


def _memory(pid: int) -> dict[str, int]:
    """Bytes by the kernel's name ("Rss", "Pss", …); empty where the process has ended meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _picture(seed: int, side: int) -> bytes:
    """A JPEG of large random patches, `side` wide."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((side, side * 3 // 4)).save(file, "JPEG")
    return file.getvalue()


def _wait_until_ready(address: str, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not _answers(lambda: httpx.get(address + "/readyz", timeout=20)):
        if time.monotonic() > end:
            raise TimeoutError("the server was not ready in time")
        time.sleep(0.5)


def _answers(ask: Callable[[], httpx.Response]) -> bool:
    try:
        return ask().status_code == 200
    except httpx.HTTPError:
        return False


def _mb(count: int) -> int:
    return round(count / 1e6)


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    main()
