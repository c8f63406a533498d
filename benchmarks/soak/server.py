"""The server that the soak test loads and breaks: app.py's own, with hooks for faults.

It does what the lines on its standard input say, "fault NAME", and answers "done NAME". Nothing of
this can be reached from outside, and app.py has none of it.
"""

import functools
import resource
import sys
import threading
import time

import psutil

import app
from minigpt4.engine import Engine
from minigpt4.errors import Unfailing
from minigpt4.web.guard import uploads
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.page import build_page, serve
from minigpt4.web.server import Server

HANG_SECONDS = 30.0  # a step that takes longer is a hang: the soak's machine may be busy
PATIENCE = 60.0  # in which a fault finds somebody
FILE_SECONDS = 300  # uploaded files live so long here, cut ones as well, to see them go


class Faults:
    """Breaks one part of the engine, once for each call."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._wanted = engine, set()
        self._wrap(engine.decoder, "forward", self._forward)
        self._wrap(engine.model, "encode_pictures", self._embed)
        self._wrap(engine._scheduler, "schedule", self._schedule)
        import minigpt4.conversation

        self._wrap(minigpt4.conversation, "encode_chat", self._encode_chat)

    def _wrap(self, owner, name, wrapper) -> None:
        setattr(owner, name, functools.partial(wrapper, getattr(owner, name)))

    def inject(self, name: str) -> None:
        """One of soak's FAULTS; returns when it has hit somebody."""
        if name == "disk":
            self._fill_disk()
        elif name == "decoder":
            for process in psutil.Process().children():  # those that open pictures
                process.kill()
        else:
            self._wanted.add(name)
        end = time.monotonic() + PATIENCE
        while name in self._wanted and time.monotonic() < end:
            time.sleep(0.05)

    def _fill_disk(self, seconds: float = 3.0) -> None:
        """No file can be written to."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(seconds)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def _once(self, name: str, condition: bool = True) -> bool:
        if name not in self._wanted or not condition:
            return False
        self._wanted.discard(name)
        return True

    def _forward(self, forward, rows):
        if "exception" in self._wanted:  # until it has hit a request that is alone in its call
            self._once("exception", len(rows.tables) == 1)
            raise RuntimeError("an injected fault")
        if self._once("memory"):
            raise MemoryError("an injected fault")
        if self._once("hang"):
            time.sleep(HANG_SECONDS + 8)
        results = forward(rows)
        if len(results) and self._once("nan"):
            results[0][:] = float("nan")
        return results

    def _embed(self, embed, pictures):
        if "encoder" in self._wanted:
            self._once("encoder", len(pictures) == 1)
            raise RuntimeError("an injected fault")
        encoded = embed(pictures)
        if self._once("encoder nan"):
            encoded[0].embeds[:] = float("nan")
        return encoded

    def _schedule(self, schedule, running):
        if self._once("thread"):
            raise SystemExit
        return schedule(running)

    def _encode_chat(self, encode_chat, *arguments):
        if self._once("tokenizer"):
            raise RuntimeError("an injected fault")
        return encode_chat(*arguments)


def main() -> None:
    """Serve until SIGTERM."""
    chosen = app.options(sys.argv[1:])
    sys.stderr = Unfailing(sys.stderr)
    engine = app.load(chosen, lambda line: None)
    engine._hang_seconds = HANG_SECONDS
    faults = Faults(engine)
    uploads.EVERY_SECONDS = 15
    uploads.KEPT_SECONDS = uploads.CUT_SECONDS = FILE_SECONDS
    server = Server(lambda: [engine], chosen)
    page = build_page(Loading.done(engine), server=server)
    with server.until_terminated(page):
        print(f"Open {serve(page, chosen, server)}", flush=True)
        threading.Thread(target=obey, args=[faults], daemon=True).start()
        server.wait(page)


def obey(faults: Faults) -> None:
    for line in sys.stdin:
        name = line.removeprefix("fault ").strip()
        faults.inject(name)
        print(f"done {name}", flush=True)


if __name__ == "__main__":
    main()
