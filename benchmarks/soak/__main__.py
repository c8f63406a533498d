"""python -m benchmarks.soak --minutes 30 --chats 32: load, faults and rubbish, then what is left.

Starts a server of its own on this machine, lets so many users ask, stop, vanish and misbehave while
faults are injected, and then asks again, alone, what was answered in the crowd. The exit status is
0 where no answer was lost, foreign or different, and nothing grew.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from benchmarks import free_port
from benchmarks.soak.server import FILE_SECONDS, HANG_SECONDS
from benchmarks.soak.users import SETTINGS, Asked, Ledger, User, body
from minigpt4.data.outputs import print_json

FAULTS = (
    *("exception", "nan", "memory", "thread", "hang"),  # of the engine
    *("encoder", "encoder nan", "tokenizer", "decoder", "disk"),
)
AFTER_FAULT = 15.0  # seconds in which its error may reach a slow reader
WARM_SHARE = 0.25  # of the run, before which memory may still grow: caches fill
ASKED_AGAIN = 60
KV_MEGABYTES = 128  # less than usual: full within the warm share, or filling it looks like a leak


def main() -> int:
    """Run, print the record as JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--json", metavar="OUT", help="write the record here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = Soak(options, Path(folder)).run()
    print_json(record, options.json)
    return 0 if record["held"] else 1


class Soak:
    """One run. folder: for the server's temporary files."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._ledger = Ledger()
        self._survived: list[str] = []
        self._samples: list[dict] = []

    def run(self) -> dict:
        """The record."""
        port = free_port()
        self._address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "benchmarks.soak.server", "--model", self._options.model]
        command += ["--port", str(port), "--max-queue", "16", "--max-running", "12"]
        command += ["--kv-megabytes", str(KV_MEGABYTES)]
        self._log = (self._folder / "server.log").open("w")
        self._uploads = self._folder / "uploads"
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "GRADIO_TEMP_DIR": str(self._uploads)},
        )
        try:
            if not self._server.stdout.readline().startswith("Open"):
                raise SystemExit((self._folder / "server.log").read_text())
            self._process = psutil.Process(self._server.pid)
            begun = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            asyncio.run(self._load())
            self._settle()
            again = self._ask_again()
            self._rest["files"] = self._files_left()
            self._server.send_signal(signal.SIGTERM)
            status = self._server.wait(timeout=60)
        finally:
            self._server.kill()
            self._server.wait()
        return self._record(begun, again, status)

    # --- load ------------------------------------------------------------------------------------

    async def _load(self) -> None:
        page = await self._page()
        self._begun = time.monotonic()
        self._end = self._begun + 60 * self._options.minutes
        threading.Thread(target=self._break_things, daemon=True).start()
        threading.Thread(target=self._sample_often, daemon=True).start()
        users = [
            User(self._address, n, self._ledger, page) for n in range(1, self._options.chats + 1)
        ]
        await asyncio.gather(*(user.live(self._end) for user in users))

    async def _page(self) -> dict:
        """What a browser learns from the page: its events' numbers."""
        async with httpx.AsyncClient(base_url=self._address, timeout=60) as client:
            config = (await client.get("/config")).json()
        names = {d["api_name"]: d["id"] for d in config["dependencies"]}
        settings = [*SETTINGS_IN_ORDER]
        return {"events": names, "settings": settings}

    def _break_things(self) -> None:
        """Each fault in turn, the rare ones as often as the others."""
        dice, pause = random.Random(1), 60 * self._options.minutes / (2 * len(FAULTS) + 1)
        pause = min(45.0, max(4.0, pause))
        while time.monotonic() + pause < self._end:
            for fault in dice.sample(FAULTS, len(FAULTS)):
                time.sleep(pause)
                if time.monotonic() + HANG_SECONDS > self._end:
                    return
                self._ledger.fault_until = float("inf")
                self._server.stdin.write(f"fault {fault}\n")
                self._server.stdin.flush()
                self._server.stdout.readline()  # comes when it has hit somebody
                lasts = HANG_SECONDS + 10 if fault == "hang" else 0
                self._ledger.fault_until = time.monotonic() + lasts + AFTER_FAULT
                if self._ready_within(120):
                    self._survived.append(fault)

    def _ready_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if httpx.get(self._address + "/readyz", timeout=30).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(1)
        self._ledger.wrong.append("not ready two minutes after a fault")
        return False

    def _sample_often(self) -> None:
        while time.monotonic() < self._end:
            self._samples.append(self._sample())
            time.sleep(max(1.0, 60 * self._options.minutes / 360))

    def _sample(self) -> dict:
        # os.walk passes over folders that are deleted meanwhile; Path.rglob raises.
        files = sum(len(names) for _, _, names in os.walk(self._uploads))
        return {
            "seconds": round(time.monotonic() - self._begun),
            "megabytes": self._megabytes(),
            "handles": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "files": files,
            "chats": self._ledger.chats,
        }

    def _megabytes(self) -> int:
        """Resident, of the server and of the processes that open its pictures."""
        total = 0
        for process in [self._process, *self._process.children()]:
            with suppress(psutil.NoSuchProcess):  # a fault has ended it
                total += process.memory_info().rss
        return round(total / 2**20)

    # --- afterwards ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Nobody asks any more: everything must be back where it was."""
        if not self._ready_within(120):
            return
        end = time.monotonic() + 60
        while time.monotonic() < end:
            metrics = httpx.get(self._address + "/metrics", timeout=30).text
            if "active_chats 0" in metrics and "queue_length 0" in metrics:
                break
            time.sleep(1)
        else:
            self._ledger.wrong.append("requests are left in the engine")
        time.sleep(10)
        self._rest = self._sample()

    def _ask_again(self) -> dict:
        """Is an answer that was given in the crowd the one that is given alone?"""
        chosen = random.Random(2).sample(
            self._ledger.asked, min(ASKED_AGAIN, len(self._ledger.asked))
        )
        different = [asked for asked in chosen if not self._same_alone(asked)]
        self._ledger.wrong += [f"different alone: {a.question} {a.answer!r}" for a in different]
        return {"asked again alone": len(chosen), "different": len(different)}

    def _same_alone(self, asked: Asked) -> bool:
        sent = body(asked.question, asked.picture, logprobs=True)
        url = self._address + "/v1/chat/completions"
        choice = httpx.post(url, json=sent, timeout=240).json()["choices"][0]
        logprobs = [t["logprob"] for t in choice["logprobs"]["content"]]
        same = choice["message"]["content"].strip() == asked.answer.strip()
        return same and asked.logprobs in (None, logprobs)

    def _files_left(self) -> int:
        """Uploaded files, once the last of them have had the time to be deleted."""
        end = time.monotonic() + FILE_SECONDS + 60
        while self._sample()["files"] > self._samples[0]["files"] and time.monotonic() < end:
            time.sleep(5)
        return self._sample()["files"]

    def _record(self, begun: str, again: dict, status: int) -> dict:
        outcomes = dict(sorted(self._ledger.outcomes.items()))
        warm = [
            s for s in self._samples if s["seconds"] >= WARM_SHARE * self._samples[-1]["seconds"]
        ]
        half = len(warm) // 2
        drift = {
            name: {
                "first half": statistics.median(s[name] for s in warm[:half]),
                "second half": statistics.median(s[name] for s in warm[half:]),
                "most": max(s[name] for s in self._samples),
                "at rest": self._rest[name],
            }
            for name in ("megabytes", "handles", "threads", "files")
        }
        # Files come and go with the load, which is not the same all the time: what counts is that
        # they go.
        flat = self._rest["files"] <= self._samples[0]["files"] and all(
            drift[name]["second half"] <= drift[name]["first half"] * 1.1 + slack
            for name, slack in (("megabytes", 20), ("handles", 5), ("threads", 5))
        )
        bad = sum(outcomes.get(k, 0) for k in ("lost", "foreign", "rubbish answered wrongly"))
        return {
            "held": not (bad or again["different"] or not flat or status),
            "begun": begun,
            "minutes": self._options.minutes,
            "chats": self._options.chats,
            "load average at the end": [round(x, 1) for x in os.getloadavg()],
            "held load": {
                "answers": outcomes.get("answered", 0),
                "chats at once, at most": self._ledger.most_chats,
                "chats at once, median": statistics.median(s["chats"] for s in self._samples),
            },
            "faults survived": {f: self._survived.count(f) for f in FAULTS},
            "outcomes": outcomes,
            "lost": outcomes.get("lost", 0),
            "foreign": outcomes.get("foreign", 0),
            **again,
            "flat": flat,
            "drift": drift,
            "exit status after SIGTERM": status,
            "wrong": self._ledger.wrong[:20],
            "tracebacks in the server's log": self._tracebacks(),
        }

    def _tracebacks(self) -> dict[str, int]:
        """The last line of each, and how often."""
        self._log.close()
        found: dict[str, int] = {}
        inside = False
        for line in (self._folder / "server.log").read_text(errors="replace").splitlines():
            if line.startswith("Traceback"):
                inside = True
            elif inside and line and not line.startswith((" ", "\t")):
                inside = False
                found[line[:120]] = found.get(line[:120], 0) + 1
        return found


# The page's controls, in its own order: minigpt4/web/page/panel.py.
SETTINGS_IN_ORDER = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "num_beams",
    "seed",
    "system",
)
assert set(SETTINGS) <= set(SETTINGS_IN_ORDER)

if __name__ == "__main__":
    sys.exit(main())
