"""Pictures that were made to break the program that opens them: bombs, polyglots, endless ones."""

import functools
import io
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4 import image
from minigpt4.errors import UserError
from minigpt4.image import Picture, load, smaller
from tests.test_image import FORMATS, encoded, png, quarters, refusal

ROOT = Path(__file__).parent.parent
CORPUS_FOLDER = ROOT / "tests" / "corpus" / "pictures"
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def in_new_process(code: str) -> str:
    """What `code` prints, in a process whose memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- size --------------------------------------------------------------------------------------

MEASURE = """
import io, sys, zlib, struct
from PIL import Image
from minigpt4.image import load
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
def file(mode, **options):
    made = io.BytesIO()
    Image.new(mode, (8000, 5000)).save(made, "PNG", compress_level=1, **options)
    return made.getvalue()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_just_under_the_limit_takes_bounded_memory():
    """40 megapixels in each way that needs copies: 537 MB at most when this was written, of which
    160 are the picture's pixels; with 64-bit numbers for all of a deep picture it was 994."""
    made = "files = [file('I;16'), file('RGBA')]\nbefore = peak()\n"
    # What making the files took is within `before`, at most one such picture.
    loop = "for f in files: assert load(f).rgb.size == (8000, 5000)\nprint(peak(), before)"
    most, _ = map(int, in_new_process(MEASURE + made + loop).split())
    assert most < 700


@pytest.mark.parametrize("size", [(1, 1), (1, 1_000_000), (1_000_000, 1), (65_535, 60)])
def test_odd_shapes(size):
    start = time.perf_counter()
    picture = load(encoded(Image.new("L", size, 7), "PNG"))
    assert picture.rgb.size == size and picture.rgb.getpixel((0, 0)) == (7, 7, 7)
    assert time.perf_counter() - start < 20


def test_many_large_pictures_are_refused_before_they_fill_the_memory(monkeypatch):
    """Each is small enough, all together are not; those that nobody has any more count no more."""
    monkeypatch.setattr(image, "HELD_PIXELS", image.held.pixels + 2_500_000)
    million = encoded(Image.new("1", (1000, 1000)), "PNG")
    kept = [load(million), load(million)]
    with pytest.raises(UserError, match="Too many large pictures") as caught:
        load(million)
    assert caught.value.kind == "memory"
    load(encoded(Image.new("1", (600, 600)), "PNG"))  # a small one still can
    del kept[0]
    load(million)
    before = image.held.pixels
    refusal(million[:100])
    assert image.held.pixels == before


def test_a_picture_that_was_seen_is_kept_small():
    picture = load(encoded(Image.new("RGB", (4000, 1000), "teal"), "PNG"))
    small = smaller(picture, 2048)
    assert small.rgb.size == (2048, 512) and small.key == picture.key
    assert smaller(small, 2048) is small


def test_two_are_decoded_at_a_time(monkeypatch):
    """However many people send one at the same moment."""
    now, most, lock = 0, 0, threading.Lock()
    upright = image._upright

    def slow(*arguments):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return upright(*arguments)

    monkeypatch.setattr(image, "_upright", slow)
    data = encoded(quarters(), "PNG")
    threads = [threading.Thread(target=load, args=[data]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == image.DECODED_AT_ONCE


# --- bombs ----------------------------------------------------------------------------------------


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(100_000_000), 9)


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A sound PNG with one more chunk after its header."""
    data = png(1, 1, data=bytes(4))
    return data[:33] + chunk(kind, body) + data[33:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_chunks_do_not_unfold(kind):
    """100 MB of zeros in 100 kB: refused or left folded, never taken into memory."""
    packed = packed_zeros()
    body = b"key\0\1\0\0\0" + packed if kind == b"iTXt" else b"key\0\0" + packed
    data = with_chunk(kind, body)
    tracemalloc.start()
    try:
        load(data)
    except UserError as error:
        assert "damaged" in str(error)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50_000_000


def tiff(tags: list[tuple[int, int, int, int]], data: bytes, following: int = 0) -> bytes:
    """A TIFF file of one directory: (tag, type, count, value) each."""
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return head + entries + struct.pack("<I", following) + data


@pytest.mark.parametrize("rows", [1, 2**31, 2**32 - 1])
def test_tiff_bombs(rows):
    """Strips that unfold to more than the picture has; sizes and counts that no file can have."""
    packed = packed_zeros()
    for width, height, count in ((1, 1, len(packed)), (2**31, 1, 9), (8, 8, 2**32 - 1)):
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8)]
        tags += [(262, 3, 1, 1), (273, 4, 1, 134), (277, 3, 1, 1), (278, 4, 1, rows)]
        tags += [(279, 4, 1, count)]
        start = time.perf_counter()
        try:
            assert load(tiff(tags, packed)).rgb.size == (width, height)
        except UserError as error:
            assert "0x" not in str(error)
        assert time.perf_counter() - start < 10


def test_a_tiff_directory_that_leads_to_itself():
    data = encoded(Image.new("L", (4, 4), 9), "TIFF")
    first = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[first : first + 2])[0]
    end = first + 2 + 12 * count
    looped = data[:end] + struct.pack("<I", first) + data[end + 4 :]
    assert load(looped).rgb.getpixel((0, 0)) == (9, 9, 9)


def test_a_jpeg_of_ten_thousand_scans():
    """A progressive file may repeat its refining scans; each costs a pass over all pixels."""
    data = encoded(quarters(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 10_000 + b"\xff\xd9"
    start = time.perf_counter()
    assert "unusual" in refusal(bomb)
    assert time.perf_counter() - start < 5
    assert load(data).rgb.size == (64, 48)


def test_what_stands_behind_a_jpeg_is_no_scan():
    """Phones append a video to a photo; metadata may hold any bytes."""
    comment = b"\xff\xda" * 1000
    data = encoded(quarters(), "JPEG", comment=comment)
    assert load(data + comment).key == load(encoded(quarters(), "JPEG")).key


def gif_of(frames: int) -> bytes:
    frame = b"\x21\xf9\4\0\1\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0\xff\0\0\0\0\xff" + frame * frames + b";"


def apng_of(frames: int) -> bytes:
    still = png(1, 1, data=b"\0\xff\0\0")
    control = chunk(b"acTL", struct.pack(">II", frames, 0))
    more = b""
    for number in range(frames):
        more += chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * number, 1, 1, 0, 0, 1, 10, 0, 0))
        more += chunk(b"fdAT", struct.pack(">I", 2 * number + 1) + zlib.compress(b"\0\0\0\xff"))
    return still[:33] + control + still[33:-12] + more + still[-12:]


def webp_of(frames: int) -> bytes:
    return animation(frames, "WEBP", 1, lossless=True, method=0)


def tiff_of(frames: int) -> bytes:
    """Pillow needs a quadratic time to write many; the second is repeated by hand instead: each
    directory names the next, and all of them the same pixel."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    size = 2 + 12 * (len(tags) + 4) + 4
    made = struct.pack("<2sHI", b"II", 42, 16) + b"\xff\0" + bytes(6)
    for number in range(frames):
        pixel = 8 if number == 0 else 9  # the first is white, the others are black
        more = [(273, 4, 1, pixel), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 1)]
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags + more)
        following = 16 + size * (number + 1) if number + 1 < frames else 0
        made += struct.pack("<H", len(tags) + 4) + entries + struct.pack("<I", following)
    return made


def avif_of(frames: int) -> bytes:
    return animation(frames, "AVIF", 4, speed=10, quality=100, subsampling="4:4:4")


def animation(frames: int, format: str, side: int, **options) -> bytes:
    """The first frame is red, the others are not, and differ from one to the next."""
    stills = [Image.new("RGB", (side, side), color) for color in ("red", "blue", "lime")]
    more = [stills[1 + number % 2] for number in range(frames - 1)]
    return encoded(stills[0], format, save_all=True, append_images=more, **options)


FIRST = {tiff_of: (255, 255, 255)}


@pytest.mark.parametrize("made", [gif_of, apng_of, webp_of, tiff_of, avif_of])
def test_ten_thousand_frames(made):
    """One is looked at."""
    data = made(10_000)
    with Image.open(io.BytesIO(data)) as opened:
        # Of a TIFF it would count for minutes; in an APNG, the still picture counts too.
        assert made is tiff_of or opened.n_frames >= 10_000
    start = time.perf_counter()
    seen = load(data).rgb.getpixel((0, 0))
    assert time.perf_counter() - start < 5
    assert max(abs(a - b) for a, b in zip(seen, FIRST.get(made, (255, 0, 0)), strict=True)) < 4


def test_text_named_png(tmp_path):
    path = tmp_path / "poem.png"
    path.write_text("Shall I compare thee to a summer's day?")
    assert "not a picture" in refusal(path)


def test_a_size_that_is_not_the_one_that_was_said():
    """Found by the fuzzer: what was counted for the header must go back when it is another."""
    data = (CORPUS_FOLDER / "smaller-than-it-says.heic").read_bytes()
    before = image.held.pixels
    with Image.open(io.BytesIO(data)) as opened:
        said = opened.width * opened.height
    picture = load(data)
    real = picture.rgb.width * picture.rgb.height
    assert real < said and image.held.pixels == before + real
    del picture
    assert image.held.pixels == before


# --- cut, damaged, several things at once -------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_at_every_offset(format):
    """A small file, so that it really is every one; the sentence is always ours."""
    data = encoded(Image.new("RGB", (8, 6), "teal"), format)
    for length in range(len(data)):
        try:
            assert isinstance(load(data[:length]), Picture)
        except UserError as error:
            assert not any(bad in str(error) for bad in ("0x", "<", "\n"))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
TAILS = [b"%PDF-1.7\n", b"PK\x03\x04", b"<html><script>alert(1)</script>", SVG, b"%!PS\n(%pipe%id)"]


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: repr(tail[:5]))
def test_polyglots(tail):
    """A picture with something else behind is the picture; with it before, it is refused."""
    data = encoded(quarters(), "PNG")
    assert load(data + tail).key == load(data).key
    refusal(tail + data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (SVG, "an SVG drawing"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (r) file", "an EPS"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop document"),
        (b"SIMPLE  =                    T" + b" " * 3000, "a FITS file"),
    ],
)
def test_documents_are_refused_by_name_and_start_no_program(data, name):
    started = []
    watching = True

    def watch(event, arguments):
        if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            started.append(arguments)

    sys.addaudithook(watch)
    try:
        assert name in refusal(data)
    finally:
        watching = False
    assert not started


def test_only_the_listed_formats_are_tried():
    """Pillow has forty more openers; none of them sees a stranger's bytes."""
    made = {}
    for format in ("PPM", "TGA", "PCX", "SGI", "ICO", "IM", "MSP", "DDS", "JPEG2000", "SPIDER"):
        file = io.BytesIO()
        mode = {"MSP": "1", "SPIDER": "F"}.get(format, "RGB")
        try:
            Image.new(mode, (64, 64)).save(file, format)
        except (OSError, KeyError):  # this Pillow cannot write it
            continue
        made[format] = file.getvalue()
    assert len(made) >= 6
    for format, data in made.items():
        assert "JPEG, PNG, WebP" in refusal(data), format


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "a\0b.png", "x" * 4096 + ".png", "<img src=x onerror=alert(1)>.png", "‮"],
    ids=["up", "nul", "long", "html", "rtl"],
)
def test_names(name, tmp_path):
    sentence = refusal(os.path.join(tmp_path, name))
    assert len(sentence) < 200


# --- whatever else there is ---------------------------------------------------------------------

CORPUS = sorted(CORPUS_FOLDER.iterdir())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(CORPUS),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=6)), max_size=6),
    st.floats(0, 1),
)
def test_sound_files_that_were_changed(path, changes, end):
    """A picture or one sentence; and what was counted as held goes back."""
    data = bytearray(path.read_bytes())
    for place, written in changes:
        start = int(place * len(data))
        data[start : start + len(written)] = written
    before = image.held.pixels
    try:
        load(bytes(data[: int(end * len(data)) + 1]))
    except UserError as error:
        assert not any(bad in str(error) for bad in ("0x", "<", "\n"))
    assert image.held.pixels == before
