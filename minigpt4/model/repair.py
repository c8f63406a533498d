"""Slightly damaged JPEG and PNG files that other viewers would still show."""

import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
END_OF_JPEG = b"\xff\xd9"
MOST_MISSING = 0.05  # of a JPEG's pixels
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # others occur within compressed data
_UNDECODED = 128  # libjpeg fills what it has no data for with this grey
_BAND = 8  # rows of a JPEG block


def without_damaged_chunks(file: BinaryIO) -> BinaryIO:
    """A PNG file without the ancillary chunks whose checksum is wrong, as libpng reads it.

    The file itself if there are none. A chunk of the picture itself is never left out.
    """
    file.seek(len(PNG))
    damaged = []
    while len(head := file.read(8)) == 8:
        start, length = file.tell() - 8, int.from_bytes(head[:4], "big")
        if not head[4] & 0x20:  # critical: its decoder checks it
            file.seek(length + 4, io.SEEK_CUR)
            continue
        body, checksum = file.read(length), file.read(4)
        if len(checksum) == 4 and zlib.crc32(head[4:] + body) != int.from_bytes(checksum, "big"):
            damaged.append((start, file.tell()))
    file.seek(0)
    if not damaged:
        return file
    data, kept, place = file.read(), [], 0
    for start, end in damaged:
        kept.append(data[place:start])
        place = end
    return io.BytesIO(b"".join([*kept, data[place:]]))


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(kind, place of its length) of a JPEG file's markers before its end; a video may follow."""
    place = 0
    while (found := _MARKER.search(data, place)) and found[1] != b"\xd9":
        kind, place = found[1][0], found.end()
        yield kind, place
        # A segment's length counts itself; markers below 0xC0 have none, and libjpeg skips them.
        if kind >= 0xC0 and kind != 0xD8:
            place += int.from_bytes(data[place : place + 2], "big")


def with_end(file: BinaryIO) -> BinaryIO:
    """A JPEG file that ends early, with an end marker, so that libjpeg decodes what there is."""
    file.seek(0)
    return io.BytesIO(file.read() + END_OF_JPEG)


def all_scans_begun(file: BinaryIO) -> bool:
    """Whether a JPEG file has, at least in part, the last scan of each coefficient.

    A progressive file that ends before shows the whole picture, but without its details.
    """
    file.seek(0)
    data = file.read()
    open_coefficients: set[tuple[int, int]] = set()  # (component, number of the coefficient)
    for kind, place in jpeg_segments(data):
        start = place + 2
        if kind not in (0xC0, 0xC1, 0xC2, 0xDA):  # the frame's header, and each scan's
            continue
        if kind != 0xDA:  # SOF: precision, height, width, components of three bytes each
            ids = data[start + 6 : start + 6 + 3 * data[start + 5] : 3]
            open_coefficients = {(id_, number) for id_ in ids for number in range(64)}
            continue
        ids = data[start + 1 : start + 1 + 2 * data[start] : 2]
        first, last, approximation = data[start + 1 + 2 * len(ids) :][:3]
        if approximation & 0x0F == 0:  # no less significant bits follow
            open_coefficients -= {(i, n) for i in ids for n in range(first, last + 1)}
    return not open_coefficients


def missing_share(image: Image.Image) -> float:
    """The share of a JPEG's pixels, counted from the end, for which its file had no data."""
    bands = range(image.height - image.height % -_BAND - _BAND, -1, -_BAND)
    missing = 0
    for top in bands:
        box = (0, top, image.width, min(top + _BAND, image.height))
        grey = (np.asarray(image.crop(box).convert("RGB")) == _UNDECODED).all(axis=(0, 2))
        columns = int(np.argmin(grey[::-1])) if not grey.all() else image.width
        missing += columns * (box[3] - top)
        if columns < image.width:
            break
    return missing / (image.width * image.height)
