"""Strangers' pictures are opened in processes of their own, whose time and memory have an end.

`image.load` refuses what is known to be too much. What it does not foresee takes such a process
with it, not the server: the file is refused, and the next one gets a new process.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from PIL import Image

from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture

try:
    import resource
except ImportError:  # Windows has no such limits; those of the clock remain
    resource = None

CPU_SECONDS = 20  # of one picture; the largest allowed take about two
CLOCK_SECONDS = 120
MEGABYTES = 1500  # beyond what the process has at its start

_ROOT = Path(__file__).resolve().parents[3]
_HOPELESS = "The picture takes too long, or too much memory, to open: save it anew as JPEG or PNG."


class Decoders:
    """`count` processes, started when they are needed; they end with this one."""

    def __init__(self, count: int = image.DECODED_AT_ONCE, **limits: int) -> None:
        self._free: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(_Decoder(**limits))

    def load(self, source: str | os.PathLike | bytes) -> Picture:
        """As `image.load`; UserError where it would take too long or too much memory, as well."""
        try:
            decoder = self._free.get(timeout=image.DECODING_WAIT)
        except queue.Empty:
            raise UserError(image.BUSY, "queue_full", "pictures_busy") from None
        try:
            return decoder.load(source)
        finally:
            self._free.put(decoder)


class _Decoder:
    """One process, and the end of it that is here; one picture at a time."""

    def __init__(
        self,
        cpu_seconds: int = CPU_SECONDS,
        clock_seconds: float = CLOCK_SECONDS,
        megabytes: int = MEGABYTES,
    ) -> None:
        self._limits = {"cpu_seconds": cpu_seconds, "megabytes": megabytes}
        self._clock_seconds = clock_seconds
        self.process: subprocess.Popen | None = None

    def load(self, source: str | os.PathLike | bytes) -> Picture:
        """UserError where it may not be, or where the process ends over it."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        late = threading.Timer(self._clock_seconds, self.process.kill)
        late.start()
        try:
            return self._ask(source)
        except (OSError, EOFError):
            self._end()
            raise UserError(_HOPELESS, message_id="picture_hopeless") from None
        finally:
            late.cancel()

    def _start(self) -> subprocess.Popen:
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "minigpt4.web.guard.decoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not sent is not wanted any more
                pipe.close()

    def _ask(self, source: str | os.PathLike | bytes) -> Picture:
        to, back = self.process.stdin, self.process.stdout
        if isinstance(source, bytes):
            asked = {"length": len(source), **self._limits}
        else:
            asked = {"path": os.path.abspath(source), **self._limits}
        to.write(json.dumps(asked).encode() + b"\n")
        if isinstance(source, bytes):
            to.write(source)
        to.flush()
        if not (line := back.readline()):
            raise EOFError
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(*reply["error"])
        width, height = reply["size"]
        content = back.read(width * height * 3)
        if len(content) < width * height * 3:
            raise EOFError
        image.held.take(width * height)
        return image.hold(Image.frombytes("RGB", (width, height), content), reply["key"])


_decoders = Decoders()
load = _decoders.load


# --- in the process -------------------------------------------------------------------------------


def serve() -> None:
    """Opens what standard input names, until it ends, and writes the pixels to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the server
    at_start = _address_space()
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        source = asked["path"] if "path" in asked else sys.stdin.buffer.read(asked["length"])
        limit(asked["cpu_seconds"], at_start + asked["megabytes"] * 2**20)
        try:
            picture = image.load(source)
        except UserError as error:
            _reply({"error": error.args})
        else:
            _reply({"size": picture.rgb.size, "key": picture.key}, picture.rgb.tobytes())
            del picture


def limit(cpu_seconds: int, address_space: int) -> None:
    """From now on; the system ends the process that needs more time, or gives it no more bytes."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))


def _address_space() -> int:
    """Bytes that this process has already."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 2**30
    return pages * resource.getpagesize()


def _reply(header: dict, content: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
