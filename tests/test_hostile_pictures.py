"""Pictures that were made to break the program that opens them: bombs, polyglots, endless ones."""

import functools
import gc
import io
import os
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4.errors import UserError
from minigpt4.model import image, image_file
from minigpt4.model.image import Picture, fitted, load, packed, smaller
from tests.running import python
from tests.test_image import (
    FORMATS,
    RED,
    assert_colour,
    encoded,
    noise,
    png,
    quarters,
    refusal,
    swapped_profile,
    turned,
)

ROOT = Path(__file__).parent.parent
CORPUS_FOLDER = ROOT / "tests" / "corpus" / "pictures"
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def in_new_process(code: str) -> str:
    """What `code` prints, in a process whose memory is its own."""
    return python("-c", code, seconds=240).stdout


# --- size --------------------------------------------------------------------------------------

MEASURE = """
import io, sys, zlib, struct
from PIL import Image
from minigpt4.model.image import load
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) >> 10
def file(mode, **options):
    made = io.BytesIO()
    Image.new(mode, (8000, 5000)).save(made, "PNG", compress_level=1, **options)
    return made.getvalue()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.trust("Pictures", "memory of pictures just under 40 megapixels")
def test_just_under_the_limit_takes_bounded_memory():
    """40 megapixels in each way that needs copies: 537 MB at most when this was written, of which
    160 are the picture's pixels; with 64-bit numbers for all of a deep picture it was 994."""
    made = "files = [file('I;16'), file('RGBA')]\nbefore = peak()\n"
    # What making the files took is within `before`, at most one such picture.
    loop = "for f in files: assert load(f).rgb.size == (8000, 5000)\nprint(peak(), before)"
    most, _ = map(int, in_new_process(MEASURE + made + loop).split())
    assert most < 700


@pytest.mark.parametrize("size", [(1, 1), (1, 1_000_000), (1_000_000, 1), (65_535, 60)])
@pytest.mark.trust("Pictures", "1 × 1 and 1 × 1,000,000 pixels")
def test_odd_shapes(size):
    start = time.process_time()
    picture = load(encoded(Image.new("L", size, 7), "PNG"))
    assert picture.rgb.size == size and picture.rgb.getpixel((0, 0)) == (7, 7, 7)
    assert time.process_time() - start < 20


@pytest.mark.trust("Pictures", "many large pictures at once")
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


@pytest.mark.trust("Pictures", "many large pictures at once")
def test_a_picture_that_was_seen_is_kept_small():
    picture = load(encoded(Image.new("RGB", (4000, 1000), "teal"), "PNG"))
    small = smaller(picture, 2048)
    assert small.rgb.size == (2048, 512) and small.key == picture.key
    assert smaller(small, 2048) is small


@pytest.mark.trust("Pictures", "thousands of pictures in chats that have ended")
def test_pictures_of_history_are_packed():
    """Decoded, those of some six hundred chats took all the room there is for pictures."""
    gc.collect()  # earlier tests' pictures
    before = image.held.pixels
    photo = load(encoded(Image.radial_gradient("L").resize((1200, 900)).convert("RGB"), "JPEG"))
    kept = packed(photo, 1024)
    assert kept.key == photo.key and kept.rgb.size == (1024, 768) and packed(kept, 1024) is kept
    difference = np.asarray(kept.rgb, int) - np.asarray(fitted(photo.rgb, 1024), int)
    assert np.abs(difference).mean() < 3
    del photo
    gc.collect()
    assert image.held.pixels == before
    small = load(encoded(Image.new("RGB", (500, 500), "teal"), "PNG"))
    assert packed(small, 1024) is small  # exact


@pytest.mark.trust("Pictures", "many large pictures at once")
def test_two_are_decoded_at_a_time(monkeypatch):
    """However many people send one at the same moment."""
    now, most, lock = 0, 0, threading.Lock()
    upright = image_file._upright

    def slow(*arguments):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return upright(*arguments)

    monkeypatch.setattr(image_file, "_upright", slow)
    data = encoded(quarters(), "PNG")
    threads = [threading.Thread(target=load, args=[data]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == image.DECODED_AT_ONCE


@pytest.mark.trust("Pictures", "many large pictures at once")
def test_nobody_waits_for_ever_to_be_decoded(monkeypatch):
    monkeypatch.setattr(image, "DECODING_WAIT", 0.01)
    data = encoded(quarters(), "PNG")
    for _ in range(image.DECODED_AT_ONCE):
        assert image._decoding.acquire(timeout=1)
    try:
        with pytest.raises(UserError, match="try again in a minute") as caught:
            load(data)
        assert caught.value.kind == "queue_full"
    finally:
        for _ in range(image.DECODED_AT_ONCE):
            image._decoding.release()
    load(data)


# --- bombs ----------------------------------------------------------------------------------------


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(100_000_000), 9)


def png_with(chunks: bytes) -> bytes:
    """A sound PNG with more behind its header."""
    data = png(1, 1, data=bytes(4))
    return data[:33] + chunks + data[33:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
@pytest.mark.trust("Pictures", "compression bombs (zTXt, iCCP, iTXt, TIFF) and endless JPEG scans")
def test_compressed_chunks_do_not_unfold(kind):
    """100 MB of zeros in 100 kB: refused or left folded, never taken into memory."""
    packed = packed_zeros()
    body = b"key\0\1\0\0\0" + packed if kind == b"iTXt" else b"key\0\0" + packed
    data = png_with(chunk(kind, body))
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
@pytest.mark.trust("Pictures", "compression bombs (zTXt, iCCP, iTXt, TIFF) and endless JPEG scans")
def test_tiff_bombs(rows):
    """Strips that unfold to more than the picture has; sizes and counts that no file can have."""
    packed = packed_zeros()
    for width, height, count in ((1, 1, len(packed)), (2**31, 1, 9), (8, 8, 2**32 - 1)):
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8)]
        tags += [(262, 3, 1, 1), (273, 4, 1, 134), (277, 3, 1, 1), (278, 4, 1, rows)]
        tags += [(279, 4, 1, count)]
        start = time.process_time()
        try:
            assert load(tiff(tags, packed)).rgb.size == (width, height)
        except UserError as error:
            assert "0x" not in str(error)
        assert time.process_time() - start < 10


def test_a_tiff_directory_that_leads_to_itself():
    data = encoded(Image.new("L", (4, 4), 9), "TIFF")
    first = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[first : first + 2])[0]
    end = first + 2 + 12 * count
    looped = data[:end] + struct.pack("<I", first) + data[end + 4 :]
    assert load(looped).rgb.getpixel((0, 0)) == (9, 9, 9)


BYTE, SHORT, SIGNED_BYTE, UNDEFINED = 1, 3, 6, 7  # TIFF's types
GREY = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: 16}  # 4 x 4 pixels


def directory(tags: dict[int, int | tuple[int, bytes]], before: bytes = bytes(16)) -> bytes:
    """A TIFF file, or EXIF. A tag has a number, or a type and its data; equal data stand there
    once, behind the directory, and `before` at place 8."""
    start = 8 + len(before)
    end = start + 2 + 12 * len(tags) + 4
    entries = data = b""
    places = {}
    for tag, value in sorted(tags.items()):
        kind, written = (4, struct.pack("<I", value)) if isinstance(value, int) else value
        count = len(written) // {SHORT: 2, 4: 4}.get(kind, 1)
        if len(written) > 4:
            if written not in places:
                places[written] = end + len(data)
                data += written
            written = struct.pack("<I", places[written])
        entries += struct.pack("<2HI4s", tag, kind, count, written)
    head = struct.pack("<2sHI", b"II", 42, start) + before + struct.pack("<H", len(tags))
    return head + entries + bytes(4) + data


def shared(number: int, size: int) -> dict[int, tuple[int, bytes]]:
    """Tags that all have the same data."""
    return dict.fromkeys(range(50_000, 50_000 + number), (UNDEFINED, bytes(size)))


@contextmanager
def little_memory():
    """Of Python's own, which is where Pillow keeps a file's directories."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "HEIF"])
@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_exif_that_names_the_same_data_again_and_again(format):
    """50 kB that were 40 MB; the picture itself is sound."""
    exif = b"Exif\0\0" + directory(shared(1000, 40_000))
    data = encoded(quarters(), format, exif=exif)
    with little_memory():
        assert load(data).rgb.size == (64, 48)


@pytest.mark.parametrize("compression", [1, 8], ids=["raw, by Pillow", "deflate, by libtiff"])
@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_that_names_the_same_data_again_and_again(compression):
    """Half a megabyte that were 300, in each of the two that read the directory."""
    packed = zlib.compress(bytes(16)) if compression == 8 else bytes(16)
    tags = GREY | {259: compression, 279: len(packed)}
    assert load(directory(tags, packed)).rgb.size == (4, 4)
    data = directory(tags | shared(300, 500_000), packed)
    with little_memory():
        assert "unusual" in refusal(data)


@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_with_one_directory_for_pillow_and_one_for_libtiff():
    """Pillow takes a big-endian BigTIFF for a TIFF, whose directory stands elsewhere."""
    packed = zlib.compress(bytes(16))
    tags = GREY | {259: 8, 273: 0x80100, 279: len(packed)}
    short = b"".join(struct.pack(">2H2I", tag, 4, 1, value) for tag, value in tags.items())
    long = b"".join(struct.pack(">2HQI4x", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack(">2s3H2Q", b"MM", 43, 8, 0, 16, len(tags)) + long
    data = data.ljust(0x80000, b"\0") + struct.pack(">H", len(tags)) + short
    assert "unusual" in refusal(data.ljust(0x80100, b"\0") + packed)


@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_of_many_tags():
    assert "unusual" in refusal(directory(GREY | dict.fromkeys(range(50_000, 55_000), 1)))


@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_of_many_numbers():
    """Pillow reads all values of a directory that a tag leads to, and makes objects of them."""
    inner = struct.pack("<H2H3I", 1, 40_000, SIGNED_BYTE, 300_000, 8 + 18, 0) + bytes(300_000)
    assert "unusual" in refusal(directory(GREY | {34_665: 8}, inner))


@pytest.mark.parametrize("kind", [BYTE, SHORT])
@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_of_many_strips(kind):
    """Each took 15 microseconds and some objects, of one byte in the file."""
    places = (kind, b"\x08" * 70_000 if kind == BYTE else b"\x08\0" * 70_000)
    tags = {256: 1, 257: 70_000, 273: places, 278: 1, 279: places}
    assert "unusual" in refusal(directory(GREY | tags))


@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_whose_strips_lie_on_each_other():
    """Two of them fill the picture, and each two more fill it again."""
    places = (SHORT, b"\x08\0" * 100)
    assert "unusual" in refusal(directory(GREY | {273: places, 278: 2, 279: places}))


@pytest.mark.trust("Pictures", "hostile EXIF and TIFF directories")
def test_a_tiff_of_many_colours():
    """19 MB of them took half a minute and 2.5 GB."""
    data = directory(GREY | {262: 3, 320: (BYTE, bytes(500_000))})
    with little_memory():
        assert "unusual" in refusal(data)


def longs(*values: int) -> tuple[int, bytes]:
    return 4, struct.pack(f"<{len(values)}I", *values)


@pytest.mark.trust("Pictures", "unusual but sound files are still opened")
def test_sound_tiffs():
    """A row in a strip, tiles, one band behind the other."""
    stored = noise(32, 48)
    tags = {256: 32, 257: 48, 258: (SHORT, b"\x08\0" * 3), 259: 1, 262: 2, 277: 3}
    rows = {273: longs(*range(8, 8 + 48 * 96, 96)), 278: 1, 279: longs(*[96] * 48)}
    places = longs(*range(8, 8 + 6 * 768, 768))
    tiles = {322: 16, 323: 16, 324: places, 325: longs(*[768] * 6)}
    bands = {273: longs(8, 8 + 1536, 8 + 3072), 278: 48, 279: longs(*[1536] * 3), 284: 2}
    corners = [(left, top) for top in (0, 16, 32) for left in (0, 16)]
    crops = [stored.crop((left, top, left + 16, top + 16)) for left, top in corners]
    for more, pixels in [
        (rows, stored.tobytes()),
        (tiles, b"".join(crop.tobytes() for crop in crops)),
        (bands, b"".join(band.tobytes() for band in stored.split())),
    ]:
        assert load(directory(tags | more, pixels)).rgb.tobytes() == stored.tobytes()


def rle_bmp(width: int, height: int, body: bytes) -> bytes:
    """A BMP of 8 bits, run-length encoded, whose colours are shades of green."""
    colours = b"".join(bytes((0, shade, 0, 0)) for shade in range(256))
    head = struct.pack("<2sI2HI", b"BM", 0, 0, 0, 14 + 40 + 1024)
    sizes = struct.pack("<I2i2H2I2i2I", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return head + sizes + colours + body


@pytest.mark.parametrize("width", [1_000_000, 40_000_000])
@pytest.mark.trust("Pictures", "a BMP that skips rows it does not have")
def test_a_bmp_that_skips_rows_it_does_not_have(width):
    """A kilobyte that asked for 255 times its width."""
    data = rle_bmp(width, 1, b"\0\2\0\xff\0\1")
    with little_memory():
        assert "unusual" in refusal(data)


@pytest.mark.trust("Pictures", "unusual but sound files are still opened")
def test_a_sound_bmp_of_runs():
    body = b"\3\xc8\0\0" + b"\0\2\1\0" + b"\2\x64\0\1"
    picture = load(rle_bmp(3, 2, body))
    shades = [picture.rgb.getpixel((x, y))[1] for y in (1, 0) for x in range(3)]
    assert shades == [200, 200, 200, 0, 100, 100]


def endless_profile(elements: int) -> bytes:
    """swapped_profile() with a tag of multi-process elements, which all are the same matrix."""
    data = swapped_profile()
    count = struct.unpack(">I", data[128:132])[0]
    end = 132 + 12 * count
    tags = [struct.unpack(">4s2I", data[at : at + 12]) for at in range(132, end, 12)]
    matrix = b"matf\0\0\0\0" + struct.pack(">2H12f", 3, 3, *(1, 0, 0, 0, 1, 0, 0, 0, 1), 0, 0, 0)
    chain = b"mpet\0\0\0\0" + struct.pack(">2HI", 3, 3, elements)
    chain += struct.pack(">2I", 16 + 8 * elements, len(matrix)) * elements + matrix
    moved = [(name, place + 12, size) for name, place, size in tags]
    moved.append((b"D2B0", len(data) + 12, len(chain)))
    table = b"".join(struct.pack(">4s2I", *tag) for tag in moved)
    made = data[4:128] + struct.pack(">I", count + 1) + table + data[end:] + chain
    return struct.pack(">I", len(made) + 4) + made


@pytest.mark.trust("Pictures", "colour profiles that are endless or too large")
def test_a_profile_of_endless_elements():
    """2 x 2 pixels that took 13 seconds; the picture itself is sound."""
    data = encoded(Image.new("RGB", (2, 2), RED), "PNG", icc_profile=endless_profile(4000))
    start = time.process_time()
    assert_colour(load(data), RED)
    assert time.process_time() - start < 5


@pytest.mark.trust("Pictures", "colour profiles that are endless or too large")
def test_a_profile_larger_than_any(monkeypatch):
    data = encoded(Image.new("RGB", (2, 2), (255, 0, 0)), "PNG", icc_profile=swapped_profile())
    assert_colour(load(data), (0, 0, 255), tolerance=2)
    monkeypatch.setattr(image_file, "MAX_PROFILE", 100)
    assert_colour(load(data), (255, 0, 0))


@pytest.mark.trust("Pictures", "unusual but sound files are still opened")
def test_large_exif_and_what_is_wrong_in_it_leave_the_orientation():
    exif = turned(6)
    exif.get_ifd(0x8769)[0x927C] = bytes(50_000)  # a maker's note
    data = encoded(quarters(), "JPEG", quality=95, exif=exif.tobytes() + bytes(8000))
    assert load(data).rgb.size == (48, 64)
    beyond = tiff([(274, SHORT, 1, 6), (50_000, UNDEFINED, 2**31, 8)], b"")
    assert load(encoded(quarters(), "PNG", exif=beyond)).rgb.size == (48, 64)


def jpeg_with(segments: bytes) -> bytes:
    """A sound JPEG with more behind its start."""
    data = encoded(quarters(), "JPEG")
    return data[:2] + segments + data[2:]


def gif_with(blocks: bytes) -> bytes:
    """A sound GIF with more before its frame."""
    data = gif_of(1)
    return data[:19] + blocks + data[19:]


PROFILE = chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(1000)))
PRIVATE = chunk(b"prVt", b"")


@pytest.mark.parametrize(
    "made",
    [  # as bytes, they would be the tests' names
        lambda: jpeg_with(b"\xff\xe1\0\x09Exif\0\0x" * 2000),
        lambda: png_with(PRIVATE * 110_000),
        lambda: png_with(PROFILE * 300),
        lambda: gif_with(b"\x21\xfe" + b"\1x" * 2000 + b"\0"),
        lambda: gif_with(b"\x21\xfe\1x\0" * 2000),
        lambda: gif_with(b"\x21\xff" + b"\1x" * 200_000 + b"\0"),
        lambda: gif_with(b"?" * 200_000),
    ],
)
@pytest.mark.trust("Pictures", "endless JPEG segments, PNG chunks, GIF comments and blocks")
def test_too_many_parts(made):
    """Of a JPEG, a PNG, a GIF: what takes a quadratic time, what unfolds, what is just many."""
    assert "unusual" in refusal(made())


@pytest.mark.trust("Pictures", "compression bombs (zTXt, iCCP, iTXt, TIFF) and endless JPEG scans")
def test_a_jpeg_of_ten_thousand_scans():
    """A progressive file may repeat its refining scans; each costs a pass over all pixels."""
    data = encoded(quarters(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 10_000 + b"\xff\xd9"
    start = time.process_time()
    assert "unusual" in refusal(bomb)
    assert time.process_time() - start < 5
    assert load(data).rgb.size == (64, 48)


@pytest.mark.trust("Pictures", "compression bombs (zTXt, iCCP, iTXt, TIFF) and endless JPEG scans")
def test_scans_behind_a_marker_that_has_no_length():
    """libjpeg skips it where a restart is due, without the length that would hide 64 kB."""
    data = encoded(quarters(), "JPEG", progressive=True)
    first, last = data.index(b"\xff\xda"), data.rindex(b"\xff\xda")
    restarts = b"\xff\xdd\0\4\0\1"  # after each block, and none of them is there
    scans = (data[last:-2] + b"\xff\5\xff\xff") * 1000
    bomb = data[:first] + restarts + data[first:last] + scans + b"\xff\xd9"
    assert "unusual" in refusal(bomb)
    sound = encoded(quarters(), "JPEG", progressive=True, restart_marker_blocks=1)
    assert load(sound).rgb.size == (64, 48)


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
@pytest.mark.trust("Pictures", "10,000 frames (GIF, APNG, WebP, TIFF, AVIF)")
def test_ten_thousand_frames(made):
    """One is looked at."""
    data = made(10_000)
    with Image.open(io.BytesIO(data)) as opened:
        # Of a TIFF it would count for minutes; in an APNG, the still picture counts too.
        assert made is tiff_of or opened.n_frames >= 10_000
    start = time.process_time()
    seen = load(data).rgb.getpixel((0, 0))
    assert time.process_time() - start < 5
    assert max(abs(a - b) for a, b in zip(seen, FIRST.get(made, (255, 0, 0)), strict=True)) < 4


@pytest.mark.trust("Pictures", "text in a file named .png")
def test_text_named_png(tmp_path):
    path = tmp_path / "poem.png"
    path.write_text("Shall I compare thee to a summer's day?")
    assert "not a picture" in refusal(path)


@pytest.mark.trust("Pictures", "a size other than the header's")
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
@pytest.mark.trust("Pictures", "truncated at every offset, or damaged")
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
@pytest.mark.trust("Pictures", "polyglots")
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
@pytest.mark.trust(
    "Pictures", "SVG, PDF, EPS, PSD and FITS: named in the refusal, no program started"
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


@pytest.mark.trust(
    "Pictures", "SVG, PDF, EPS, PSD and FITS: named in the refusal, no program started"
)
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
@pytest.mark.trust("Uploads", "hostile file names")
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
@pytest.mark.trust("Pictures", "truncated at every offset, or damaged")
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
