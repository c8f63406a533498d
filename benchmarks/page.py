"""The chat page under load: how long its event loop is blocked, how soon words reach a browser.

    python -m benchmarks.page --clients 16        # answers streamed to so many visitors at once
    python -m benchmarks.page --idle 30           # CPU of a server with one open tab
    python -m benchmarks.page --visits 7          # until a new visitor sees the page and can use it
    python -m benchmarks.page --visits 7 --slow   # the same over a line of 1.6 Mbit/s

The model is replaced by words that come at a fixed pace, so that only the page is measured: one
server process, clients in another that speak the page's own protocol. Prints one line of JSON.
"""

import argparse
import asyncio
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
from PIL import Image

from benchmarks import free_port

WORDS = 300  # of an answer
# The page's controls, in their order, and the conversation that is shown.
SETTINGS = [0.5, 0.9, 1.05, 300, 1, "", "", None]
BLOCKED = 0.05  # seconds
# Chromium's own emulation: latency in ms, bytes per second.
SLOW = {
    "offline": False,
    "latency": 150,
    "downloadThroughput": 1.6e6 / 8,
    "uploadThroughput": 0.75e6 / 8,
}
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
TRANSFERRED = "performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize ?? 0), 0)"


# --- the server ---------------------------------------------------------------------------------


class PacedAnswer:
    """Stands for `conversation.Answer`: a word every `engine.pace` seconds."""

    def __init__(self, engine: SimpleNamespace, conversation: Any, sampling: object) -> None:
        from minigpt4.engine import Stats

        self._pace, self._open = engine.pace, True
        self._turn = len(conversation.messages) // 2
        self.text, self.stop_reason, self.notice, self.position = "", "", "", 0
        self.dropped_turns = 0
        self.stats = Stats(prompt_tokens=64, reused_tokens=0)

    async def __aiter__(self):
        start = time.perf_counter()
        for number in range(WORDS):
            if not self._open:
                break
            await asyncio.sleep(max(0.0, start + (number + 1) * self._pace - time.perf_counter()))
            self.text += f" word{self._turn}-{number}"
            self.stats.tokens += 1
            yield f" word{self._turn}-{number}"
        self.stats.seconds = self.stats.seconds_to_first = time.perf_counter() - start
        self.stop_reason = self.stop_reason or "stop"

    def close(self) -> None:
        self._open, self.stop_reason = False, self.stop_reason or "closed"


class LoopTimes:
    """Times every callback of every event loop in this process."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.longest = (0.0, "")
        run = asyncio.events.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            self.wall.append(wall)
            self.cpu.append(cpu)
            if cpu > self.longest[0]:
                self.longest = (cpu, repr(handle)[:600])

        asyncio.events.Handle._run = timed

    def reset(self) -> None:
        self.wall, self.cpu, self.longest = [], [], (0.0, "")

    def report(self) -> dict:
        return {
            "longest_block_ms": round(1000 * max(self.wall), 1),
            "longest_block_cpu_ms": round(1000 * max(self.cpu), 1),
            "blocks_over_50_ms": sum(seconds > BLOCKED for seconds in self.wall),
            "loop_cpu_s": round(sum(self.cpu), 2),
            "longest": self.longest[1],
        }


def serve_page(port: int, pace: float, timed: bool) -> None:
    """Serve until standard input ends; "reset" and "report" on it speak of the loop's times."""
    from minigpt4.config import MODELS
    from minigpt4.web import run
    from minigpt4.web.page import session
    from minigpt4.web.page.page import build_page, freeze_objects, serve
    from minigpt4.web.server import Server

    times = LoopTimes() if timed else None
    session.ask = PacedAnswer
    model = SimpleNamespace(config=MODELS["nano"], quantize="none", device="cpu")
    # It is never idle: no picture is captioned before it is asked about.
    engine = SimpleNamespace(
        model=model,
        decoder_name="paced words",
        pace=pace,
        encode=lambda picture: None,
        running=1,
        waiting=0,
    )
    options = run.options(["--model", "nano", "--port", str(port), "--max-running", "32"])
    address = serve(build_page(engine), options, Server(lambda: [engine], options))
    freeze_objects()  # as `launch` does
    print(address, flush=True)
    for line in sys.stdin:
        if line.strip() == "reset":
            times.reset()
        print(json.dumps(times.report() if line.strip() == "report" else {}), flush=True)


class ServerProcess:
    """`minigpt4 serve` with paced words in place of a model."""

    def __init__(self, pace: float, timed: bool = True) -> None:
        command = [sys.executable, "-m", "benchmarks.page", "--serve", "--pace", str(pace)]
        environment = {**os.environ, "GRADIO_TEMP_DIR": tempfile.mkdtemp()}
        self.process = subprocess.Popen(
            [*command, *(["--timed"] if timed else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.address = self.process.stdout.readline().strip()
        self._folder = environment["GRADIO_TEMP_DIR"]

    def tell(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


# --- the visitors -------------------------------------------------------------------------------


def photo(number: int) -> bytes:
    """A JPEG of twelve megapixels, another for each visitor."""
    file = io.BytesIO()
    small = Image.effect_noise((400, 300), 40 + number).convert("RGB")
    small.resize((4000, 3000)).save(file, "JPEG", quality=85)
    return file.getvalue()


class Visitor:
    """Attaches a photo and asks, one question after another, as the page's scripts do."""

    def __init__(self, web: httpx.AsyncClient, events: dict[str, int], number: int) -> None:
        self._web, self._events, self._session = web, events, f"visitor-{number}"
        self._number = number
        self.first: list[float] = []  # seconds from the question to the first word
        self.gaps: list[float] = []  # seconds between two updates
        self.turns = 0

    async def chat(self, turns: int) -> None:
        photos = {"files": ("photo.jpg", photo(self._number), "image/jpeg")}
        (path,) = (await self._web.post("/gradio_api/upload", files=photos)).json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        await self._event("attach", [{"text": "", "files": [file]}, None])
        for turn in range(turns):
            box = {"text": f"Question {turn}?", "files": [] if turn else [file]}
            await self._event("ask", [box, None, *SETTINGS])
            self.turns += 1

    async def _event(self, name: str, data: list) -> None:
        sent = {"data": data, "fn_index": self._events[name], "session_hash": self._session}
        start = last = time.perf_counter()
        await self._web.post("/gradio_api/queue/join", json=sent)
        url = f"/gradio_api/queue/data?session_hash={self._session}"
        async with self._web.stream("GET", url) as response:
            seen = False
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if '"process_completed"' in line:
                    if '"success":false' in line:
                        raise RuntimeError(line)
                    return
                if "process_generating" not in line or f"word{self.turns}-" not in line:
                    continue
                now = time.perf_counter()
                (self.gaps if seen else self.first).append(now - (last if seen else start))
                seen, last = True, now


async def visit(server: ServerProcess, clients: int, turns: int) -> dict:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as web:
        dependencies = (await web.get("/config")).json()["dependencies"]
        events = {d["api_name"]: d["id"] for d in dependencies}
        await Visitor(web, events, 1000).chat(1)  # what is done once
        server.tell("reset")
        visitors = [Visitor(web, events, number) for number in range(clients)]
        start = time.perf_counter()
        await asyncio.gather(*(visitor.chat(turns) for visitor in visitors))
        seconds = time.perf_counter() - start
    first = sorted(s for visitor in visitors for s in visitor.first)
    gaps = sorted(s for visitor in visitors for s in visitor.gaps)
    return {
        "seconds": round(seconds, 1),
        "answers": sum(visitor.turns for visitor in visitors),
        "first_word_ms": round(1000 * statistics.median(first)),
        "gap_ms": round(1000 * statistics.median(gaps)),
        "gap_99_ms": round(1000 * gaps[int(len(gaps) * 0.99)]),
    }


def load(clients: int, turns: int, pace: float) -> dict:
    server = ServerProcess(pace)
    try:
        found = asyncio.run(visit(server, clients, turns))
        return {"clients": clients, "turns": turns, **found, **server.tell("report")}
    finally:
        server.close()


def idle(seconds: float) -> dict:
    """CPU, in per cent of one core, with and without an open tab."""
    from playwright.sync_api import sync_playwright

    server = ServerProcess(0.02, timed=False)

    def used() -> float:
        process = psutil.Process(server.process.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(seconds)
        return round(100 * (sum(process.cpu_times()[:2]) - before) / seconds, 2)

    try:
        time.sleep(5)
        alone = used()
        with sync_playwright() as playwright:
            path = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(server.address)
            page.wait_for_selector("#box textarea")
            time.sleep(5)
            result = {"idle_percent": alone, "idle_with_a_tab_percent": used()}
            browser.close()
        return result
    finally:
        server.close()


def first_visits(count: int, slow: bool) -> dict:
    """Medians in ms, each visit in a browser that has loaded nothing before.

    painted: first contentful paint. usable: the message box is there and takes text.
    """
    from playwright.sync_api import sync_playwright

    server = ServerProcess(0.02, timed=False)
    painted, usable, kilobytes = [], [], []
    try:
        with sync_playwright() as playwright:
            path = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            for _ in range(count + 1):
                page = browser.new_page()
                if slow:
                    network = page.context.new_cdp_session(page)
                    network.send("Network.enable")
                    network.send("Network.emulateNetworkConditions", SLOW)
                page.goto(server.address, wait_until="commit")
                page.wait_for_selector("#box textarea:enabled")
                usable.append(page.evaluate("performance.now()"))
                page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]")
                painted.append(page.evaluate(FIRST_PAINT))
                kilobytes.append(page.evaluate(TRANSFERRED) / 1000)
                page.close()
            browser.close()
    finally:
        server.close()
    medians = [round(statistics.median(values[1:])) for values in (painted, usable, kilobytes)]
    return dict(zip(("painted_ms", "usable_ms", "transferred_kb"), medians, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4, help="questions of each visitor")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds between two words")
    parser.add_argument("--idle", type=float, metavar="SECONDS")
    parser.add_argument("--visits", type=int)
    parser.add_argument("--slow", action="store_true", help="visits at 1.6 Mbit/s, 150 ms latency")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve_page(free_port(), chosen.pace, chosen.timed)
    elif chosen.visits:
        print(json.dumps(first_visits(chosen.visits, chosen.slow)))
    elif chosen.idle:
        print(json.dumps(idle(chosen.idle)))
    else:
        print(json.dumps(load(chosen.clients, chosen.turns, chosen.pace)))


if __name__ == "__main__":
    main()
