"""Strangers' pictures are opened in processes whose time and memory have an end."""

import io
import signal
import subprocess
import sys

import psutil
import pytest
from PIL import Image

from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.web.guard import decoding
from minigpt4.web.guard.decoding import Decoders
from tests.running import wait_for


def picture_file(colour: str = "teal", side: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def decoders():
    return Decoders(1)


def only(decoders: Decoders):
    decoder = decoders._free.get()
    decoders._free.put(decoder)
    return decoder


def test_it_is_the_same_picture(decoders, tmp_path):
    content = picture_file("teal")
    path = tmp_path / "teal.png"
    path.write_bytes(content)
    expected = image.load(content)
    for source in (content, path, str(path)):
        opened = decoders.load(source)
        assert opened.key == expected.key
        assert opened.rgb.tobytes() == expected.rgb.tobytes()


def test_refusals_are_the_same(decoders, tmp_path):
    (tmp_path / "odd.png").write_bytes(b"%PDF-1.7\n")
    for source in (b"", b"<svg>", tmp_path / "odd.png", tmp_path / "missing.png"):
        with pytest.raises(UserError) as expected:
            image.load(source)
        with pytest.raises(UserError) as refused:
            decoders.load(source)
        assert str(refused.value) == str(expected.value)
        assert refused.value.kind == expected.value.kind


def test_what_it_takes_is_counted_and_given_back(decoders):
    before = image.held.pixels
    opened = decoders.load(picture_file("navy"))
    assert image.held.pixels == before + opened.rgb.width * opened.rgb.height
    del opened
    assert image.held.pixels == before


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_a_picture_that_takes_too_long(decoders):
    """The clock's limit: a process that does not come back is ended, the next picture opened."""
    decoders.load(picture_file())
    decoder = only(decoders)
    stuck = decoder.process
    stuck.send_signal(signal.SIGSTOP)
    decoder._clock_seconds = 0.3
    with pytest.raises(UserError, match="takes too long"):
        decoders.load(picture_file())
    decoder._clock_seconds = decoding.CLOCK_SECONDS
    assert stuck.poll() is not None
    assert decoders.load(picture_file()).rgb.width > 0


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_the_processors_time_has_an_end():
    code = "from minigpt4.web.guard.decoding import limit; limit(0, 2**40)\nwhile True: pass"
    ended = subprocess.run([sys.executable, "-c", code], timeout=300)  # a busy machine's seconds
    assert ended.returncode == -signal.SIGXCPU


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_a_picture_that_takes_too_much_memory():
    narrow = Decoders(1, megabytes=100)
    with pytest.raises(UserError):
        narrow.load(picture_file("olive", 6000))
    assert narrow.load(picture_file()).rgb.width > 0


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_a_process_that_was_killed_between_two_pictures(decoders):
    decoders.load(picture_file())
    only(decoders).process.kill()
    only(decoders).process.wait()
    assert decoders.load(picture_file()).rgb.width > 0


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b'{"size": [1',
        b'{"si\n',
        b"[]\n",
        b"{}\n",
        b"\xff\n",
        b'{"error": 3}\n',
        b'{"size": [9, 9]}\n' + bytes(243),
        b'{"size": [9, 9], "key": "x"}\n' + bytes(242),
        b'{"size": [-9, 9], "key": "x"}\n',
        b'{"size": [99999, 99999], "key": "x"}\n',
    ],
)
@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_a_process_that_ends_within_its_reply(reply, monkeypatch):
    """Whatever it has written by then: the picture is refused, and the next one is opened."""
    decoders, before = Decoders(1), image.held.pixels
    code = f"import sys; sys.stdin.buffer.readline(); sys.stdout.buffer.write({reply!r})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with monkeypatch.context() as patch:
        start = lambda _: subprocess.Popen([sys.executable, "-c", code], **pipes)  # noqa: E731
        patch.setattr(decoding._Decoder, "_start", start)
        with pytest.raises(UserError, match="takes too long"):
            decoders.load(picture_file())
    assert image.held.pixels == before
    assert decoders.load(picture_file()).rgb.width > 0


@pytest.mark.parametrize("owner", [decoding.Image, image])
@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_memory_that_ends_after_the_pixels_were_counted(decoders, owner, monkeypatch):
    def fail(*_):
        raise MemoryError

    before = image.held.pixels
    with monkeypatch.context() as patch:
        patch.setattr(owner, "frombytes" if owner is decoding.Image else "hold", fail)
        with pytest.raises(UserError, match="not enough memory") as refused:
            decoders.load(picture_file())
    assert refused.value.kind == "memory" and image.held.pixels == before
    assert decoders.load(picture_file()).rgb.width > 0


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/missing/python")
    with pytest.raises(UserError, match="takes too long"):
        Decoders(1).load(picture_file())


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(image, "DECODING_WAIT", 0.1)
    with pytest.raises(UserError, match="try again in a minute"):
        Decoders(0).load(picture_file())


@pytest.mark.trust("Pictures", "decoding that takes too much time or memory, or ends its process")
def test_they_end_with_the_program():
    code = (
        "import sys; from minigpt4.web.guard.decoding import Decoders; decoders = Decoders(1);"
        "decoders.load(sys.stdin.buffer.read()); print(decoders._free.get().process.pid)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=picture_file(), stdout=subprocess.PIPE, check=True)
    wait_for(lambda: not is_running(int(done.stdout)))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
