"""Opens strangers' pictures in separate processes, whose time and memory are limited.

`image.load` refuses pictures that are known to be too large. A picture that exceeds the limits in
another way ends such a process, not the server: the file is refused, and the next one gets a new
process.
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
from typing import IO, Any, cast

from PIL import Image

from minigpt4.errors import UserError
from minigpt4.model import image, image_file
from minigpt4.model.image import Picture

try:
    import resource
except ImportError:  # Windows has no such limits; CLOCK_SECONDS still holds
    resource = None  # type: ignore[assignment]

CPU_SECONDS = 20  # for one picture; the largest allowed ones take about two
CLOCK_SECONDS = 120
MEGABYTES = 1500  # beyond what the process has when it starts

_ROOT = Path(__file__).resolve().parents[3]
_Decoded = tuple[int, int, bytes, str]  # width, height, pixels, key
_HOPELESS = "The picture takes too long, or too much memory, to open: save it as JPEG or PNG."
_NO_MEMORY = "There is not enough memory to open the picture: try again in a minute."


class Decoders:
    """`count` processes, started when they are needed. They end with the current process."""

    def __init__(self, count: int = image.DECODED_AT_ONCE, **limits: int) -> None:
        self._free: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(_Decoder(**limits))

    def load(self, source: str | os.PathLike | bytes) -> Picture:
        """As `image.load`; also UserError if opening takes too long or too much memory."""
        try:
            decoder = self._free.get(timeout=image.DECODING_WAIT)
        except queue.Empty:
            raise UserError(image.BUSY, "queue_full", "pictures_busy") from None
        try:
            return decoder.load(source)
        finally:
            self._free.put(decoder)


class _Decoder:
    """One process and this end of its pipes. It opens one picture at a time."""

    def __init__(
        self,
        cpu_seconds: int = CPU_SECONDS,
        clock_seconds: float = CLOCK_SECONDS,
        megabytes: int = MEGABYTES,
    ) -> None:
        self._limits: dict[str, Any] = {"cpu_seconds": cpu_seconds, "megabytes": megabytes}
        self._clock_seconds = clock_seconds
        self.process: subprocess.Popen | None = None

    def load(self, source: str | os.PathLike | bytes) -> Picture:
        """The picture. UserError if it is refused, or if the process ends while opening it."""
        try:
            reply = self._ask(source)
        except MemoryError:
            self._end()
            raise UserError(_NO_MEMORY, "memory", "pictures_memory") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            self._end()
            raise UserError(_HOPELESS, message_id="picture_hopeless") from None
        except BaseException:  # Ctrl-C, for example
            self._end()  # its pipes may hold half a picture
            raise
        if isinstance(reply, UserError):
            raise reply
        return _picture(*reply)

    def _ask(self, source: str | os.PathLike | bytes) -> _Decoded | UserError:
        """The process's reply to the picture. EOFError and others if the reply is incomplete."""
        if self.process is None or self.process.poll() is not None:
            self._end()
            self.process = self._start()
        late = threading.Timer(self._clock_seconds, self.process.kill)
        late.start()
        to, back = _pipes(self.process)
        try:
            self._send(to, source)
            return self._receive(back)
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
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in _pipes(self.process):
            with suppress(OSError):  # unsent data is no longer needed
                pipe.close()
        self.process = None

    def _send(self, pipe: IO[bytes], source: str | os.PathLike | bytes) -> None:
        if isinstance(source, bytes):
            header, content = self._limits | {"length": len(source)}, source
        else:
            header, content = self._limits | {"path": os.path.abspath(source)}, b""
        pipe.write(json.dumps(header).encode() + b"\n")
        pipe.write(content)
        pipe.flush()

    def _receive(self, pipe: IO[bytes]) -> _Decoded | UserError:
        line = pipe.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        reply = json.loads(line)
        if "error" in reply:
            return UserError(*reply["error"])
        width, height = reply["size"]
        if min(width, height) < 1 or width * height > image_file.MAX_PIXELS:
            raise ValueError
        pixels = pipe.read(width * height * 3)
        if len(pixels) < width * height * 3:
            raise EOFError
        return width, height, pixels, reply["key"]


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """The process's standard input and output."""
    return cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)


def _picture(width: int, height: int, pixels: bytes, key: str) -> Picture:
    """The picture, which counts in `image.held` until nothing refers to it."""
    image.held.take(width * height)
    try:
        return image.hold(Image.frombytes("RGB", (width, height), pixels), key)
    except MemoryError:
        image.held.give_back(width * height)
        raise UserError(_NO_MEMORY, "memory", "pictures_memory") from None
    except BaseException:
        image.held.give_back(width * height)
        raise


_decoders = Decoders()
load = _decoders.load


# --- in the process -------------------------------------------------------------------------------


def serve() -> None:
    """Open the pictures that standard input names, and write their pixels to standard output."""
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
    """Limit this process from now on. Beyond that, the system ends it (processor time) or refuses
    it further memory."""
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
    """Bytes of address space that this process has now."""
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
