"""The one place that opens a user's picture file: it becomes upright sRGB, or a `UserError`."""

import base64
import hashlib
import io
import logging
import os
import re
import struct
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal, NamedTuple

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin

from minigpt4.errors import UserError
from minigpt4.model import colours, repair
from minigpt4.model.colours import STRIPE

MAX_PIXELS = 40_000_000  # after decoding
MAX_HEIC_PIXELS = 50_000_000  # of a HEIC file, which is then kept at half its size: phones have 48
MAX_JPEG_PIXELS = 200_000_000  # of a JPEG file, which can be decoded at a half, fourth or eighth
# With several scans, libjpeg keeps the coefficients of the whole picture, 6 bytes a pixel.
MAX_PROGRESSIVE_PIXELS = 64_000_000
HELD_PIXELS = 500_000_000  # of all pictures in use at a time: 2 GB, at 4 bytes each
UNPACKED_PIXELS = 300_000  # of a picture in history that is not packed: about a megabyte
DECODED_AT_ONCE = 2  # each may take some hundred megabytes beside its pixels
DECODING_WAIT = 60.0  # seconds for a turn to decode
MAX_SCANS = 200  # of a JPEG file; cameras and editors write 1 to 12, each costs a full pass
MAX_SEGMENTS = 1000  # of a JPEG file; joining those of its EXIF takes quadratic time
MAX_COMMENTS = 1000  # blocks of 255 bytes of a GIF file; joining them takes quadratic time
MAX_COMPRESSED = 200  # texts and profiles of a PNG file; each may expand to a megabyte
MAX_PARTS = 100_000  # chunks of a PNG file, blocks before the first frame of a GIF
MAX_TAGS = 4096  # of a TIFF or EXIF directory: libtiff's own limit
MAX_NUMBERS = 2**18  # in such a directory; each becomes an object
MAX_STRIPS = 2**16  # or tiles, or colours of a TIFF file, each of which costs time and memory
MAX_RLE_WIDTH = 65_535  # of a BMP file; four bytes may skip 255 rows, even where it has only one
BUSY = "Too many pictures are being opened at the moment: try again in a minute."
READABLE = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF"

# MPO has no entry of its own: Pillow's JPEG opener recognises it. AVIF comes before HEIF because
# both claim files of the brand "mif1", and only AVIF's opener lets the other try when it fails.
_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF"]
_SUFFIX = re.compile(r"(?i)\.(jpe?g|jpe|jfif|mpo|a?png|webp|avifs?|hei[cf]s?|hif|gif|bmp|tiff?)")
_TYPE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of TIFF's types
_TYPES_OF_BYTES = (1, 2, 7)  # TIFF types that Pillow keeps as bytes, without a Python object each
_TABLES = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.COLORMAP)
_OTHER_KINDS = {
    rb"(?is).*(<!doctype html|<html)": "a web page",
    rb"(?is).*<svg": "an SVG drawing",
    rb"%PDF": "a PDF document",
    rb"%!PS|\xc5\xd0\xd3\xc6": "an EPS or PostScript document",
    rb"8BPS": "a Photoshop document",
    rb"SIMPLE  =": "a FITS file",
    rb"\x00\x00\x01\x00": "an icon file",
    rb"\x00\x00\x00\x0c(jP  |JXL )|\xff[\x4f\x0a]": "a JPEG 2000 or JPEG XL picture",
    rb"PK\x03\x04": "a ZIP archive or an office document",
    rb"(?s).{4}ftyp(?!hei|hev|mif1|msf1|avi)|\x1a\x45\xdf\xa3": "a video or a camera's raw file",
}

# Pillow checks this before the limits here, which depend on the format.
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)

_decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)
_load_directory = TiffImagePlugin.ImageFileDirectory_v2.load

# The libraries' warnings about odd files are not for the user's terminal.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class _TooLarge(Exception):
    """A picture of more than `limit` pixels."""

    def __init__(self, limit: int = MAX_PIXELS) -> None:
        super().__init__(limit)
        self.limit = limit


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture: `rgb` is mode RGB and upright, without metadata.

    `key` is the SHA-256 (64 hex digits) of size and pixels: the same picture in two files has
    one key.
    """

    rgb: Image.Image
    key: str


class Packed(Picture):
    """A picture kept as a JPEG file, for history: a tenth of the memory. It is decoded whenever its
    pixels are asked for, which is seldom: engines remember embeddings by the key."""

    _content: bytes

    def __init__(self, content: bytes, key: str) -> None:
        object.__setattr__(self, "_content", content)
        object.__setattr__(self, "key", key)

    @property
    def rgb(self) -> Image.Image:
        """Decoded anew."""
        return Image.open(io.BytesIO(self._content), formats=["JPEG"]).convert("RGB")


class Detection(NamedTuple):
    """An object that a detector found: its name, its box as shares of the picture's width and
    height, and how sure the detector is, 0 to 1."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    certainty: float


class Encoded(NamedTuple):
    """What the language model takes of a picture.

    embeds: float32 [image_tokens, llm_hidden_size]. words: what a word head lists of it, "" where
    the model has none. objects: what a detector found, the surest first, if the model has one.
    """

    embeds: np.ndarray
    words: str = ""
    objects: tuple[Detection, ...] = ()


class _Held:
    """Counts the pixels of all pictures in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pixels = 0
        # A picture's finaliser gives back, and the garbage collector may run it anywhere, also in
        # the locked regions below. So giving back takes no lock: it only appends.
        self._returned: deque[int] = deque()

    @property
    def pixels(self) -> int:
        """The pixels in use now."""
        with self._lock:
            return self._settle()

    def take(self, pixels: int) -> None:
        """Count `pixels` more; UserError where that is too many."""
        with self._lock:
            if self._settle() + pixels > HELD_PIXELS:
                raise UserError(
                    "Too many large pictures are in use at the moment: scale this one down, or "
                    "try again in a minute.",
                    "memory",
                    "pictures_memory",
                )
            self._pixels += pixels

    def give_back(self, pixels: int) -> None:
        """Count `pixels` fewer, from any thread and any finaliser."""
        self._returned.append(pixels)

    def _settle(self) -> int:
        while self._returned:
            self._pixels -= self._returned.popleft()
        return self._pixels


held = _Held()


def hold(rgb: Image.Image, key: str) -> Picture:
    """A picture whose pixels are counted in `held` already, until nothing refers to it."""
    picture = Picture(rgb, key)
    weakref.finalize(picture, held.give_back, rgb.width * rgb.height).atexit = False
    return picture


def smaller(picture: Picture, side: int) -> Picture:
    """The picture scaled down to `side`, under the same key: for display and history."""
    if max(picture.rgb.size) <= side:
        return picture
    rgb = fitted(picture.rgb, side)
    try:
        held.take(rgb.width * rgb.height)
    except UserError:
        return picture
    return hold(rgb, picture.key)


def packed(picture: Picture, side: int) -> Picture:
    """The picture scaled down to `side`, under the same key and packed if that saves much."""
    if isinstance(picture, Packed) or picture.rgb.width * picture.rgb.height <= UNPACKED_PIXELS:
        return picture
    rgb = picture.rgb if max(picture.rgb.size) <= side else fitted(picture.rgb, side)
    return Packed(jpeg(rgb, 95), picture.key)


def fitted(rgb: Image.Image, side: int) -> Image.Image:
    """Scaled so that the longer side is `side`; a thin strip keeps at least a pixel of width."""
    scale = side / max(rgb.size)
    size = [max(1, round(length * scale)) for length in rgb.size]
    return rgb.resize(size, Image.Resampling.BICUBIC)


def data_url(picture: Picture, side: int, quality: int = 90) -> str:
    """The picture as a JPEG `data:` URL, scaled down to at most `side` pixels."""
    small = picture.rgb.copy()
    small.thumbnail((side, side))
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(small, quality)).decode()


def jpeg(rgb: Image.Image, quality: int = 90) -> bytes:
    """A JPEG file's content."""
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=quality)
    return file.getvalue()


def load(source: str | os.PathLike | bytes) -> Picture:
    """Open a picture file, or the bytes of one; of an animation, the first frame.

    A JPEG of up to `MAX_JPEG_PIXELS` is decoded at a smaller scale, a HEIC of up to
    `MAX_HEIC_PIXELS` kept at one. UserError where the file does
    not exist, is not a readable picture or has more than `MAX_PIXELS` pixels (checked before they
    are decoded), or where all pictures in use together have too many.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "The picture")
    path = Path(source)
    name = shown_name(path)
    if _is_address(path):
        raise UserError(f"{name} is on the web: save the picture, then name the file.")
    with _file_errors(name):
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise UserError(f"{name} is a folder or a device: name one picture file.")
        with path.open("rb") as file:
            return _decode(file, name)


def has_picture_name(name: str) -> bool:
    """Whether the name's ending, after its last dot, is one of a picture that `load` opens."""
    return bool(_SUFFIX.fullmatch(os.path.splitext(name)[1]))


def list_pictures(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a folder's picture files (by extension), sorted by name.

    Hidden files and subfolders are skipped. UserError where there are no pictures.
    """
    path = Path(path)
    name = shown_name(path)
    if _is_address(path):
        return [path]  # `load` says that it is none of this computer's
    with _file_errors(name):
        path.stat()  # raises where there is nothing
        if not path.is_dir():
            return [path]
        files = [p for p in path.iterdir() if not p.name.startswith(".") and p.is_file()]
    pictures = sorted(p for p in files if has_picture_name(p.name))
    if not pictures:
        raise UserError(f"{name} holds no picture files: choose a folder with {READABLE} files.")
    return pictures


def _is_address(path: Path) -> bool:
    return re.match("https?:", str(path), re.IGNORECASE) is not None


def shown_name(path: Path) -> str:
    """The base name, made safe for one line on a terminal or a page."""
    name = "".join(c if c.isprintable() and c not in "<>" else "?" for c in path.name)
    return name[:60] + ("…" if len(name) > 60 else "") or "This path"


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} does not exist: check the path and its spelling.") from None
    except PermissionError:
        raise UserError(f"{name} may not be read: change its permissions.") from None
    except (OSError, ValueError):
        raise UserError(f"{name} cannot be opened: check the path and its disk.") from None


@contextmanager
def _turn() -> Iterator[None]:
    """One of the `DECODED_AT_ONCE` turns; UserError where none is free within DECODING_WAIT."""
    if not _decoding.acquire(timeout=DECODING_WAIT):
        raise UserError(BUSY, "queue_full", "pictures_busy")
    try:
        yield
    finally:
        _decoding.release()


def _decode(file: BinaryIO, name: str) -> Picture:
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise UserError(
            f"{name} is empty: save or download the picture again.",
            message_id="picture_empty",
            values={"name": name},
        )
    with _picture_errors(name, head), _turn():
        _check_parts(file, head)
        image = _open(file, head)
        _check_work(image)
        return _converted(image, lambda: _loaded(image, file))


def convert(opened: Image.Image) -> Picture:
    """The same as `load`, of a picture that Pillow has opened or made; that one stays as it is."""

    def copied() -> Image.Image:
        opened.load()
        return opened.copy()

    with _picture_errors("The picture", b""), _turn():
        if 0 in opened.size:
            raise ValueError
        if opened.width * opened.height > MAX_PIXELS:
            raise _TooLarge
        return _converted(opened, copied, opened)


def _converted(
    image: Image.Image, decode: Callable[[], Image.Image], original: Image.Image | None = None
) -> Picture:
    """What `decode` makes of `image`, in upright RGB. original: has the EXIF data; by default what
    is decoded."""
    taken = 0
    try:
        held.take(image.width * image.height)
        taken = image.width * image.height
        deep = ";16" in str(getattr(image, "tile", ""))  # only known before it is decoded
        image = decode()
        size = image.width * image.height  # a HEIC file may declare another one
        if size > MAX_PIXELS:
            raise _TooLarge
        held.take(size - taken)
        taken = size
        eight = colours.brightened(image) if deep else image
        rgb = _upright(colours.on_white(colours.eight_bit(eight)), original or image)
        picture = hold(rgb, _key(rgb))
        taken = 0
        return picture
    finally:
        held.give_back(taken)


@contextmanager
def _picture_errors(name: str, head: bytes) -> Iterator[None]:
    """UserError for whatever the libraries raise. head: the file's first bytes."""
    try:
        yield
    except UserError:
        raise
    except (_TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{getattr(error, 'limit', MAX_PIXELS) / 1e6:g}"
        raise UserError(
            f"{name} has more than {limit} megapixels: scale it down and try again.",
            message_id="picture_too_large",
            values={"name": name, "megapixels": limit},
        ) from None
    except Image.UnidentifiedImageError:
        kinds = (kind for pattern, kind in _OTHER_KINDS.items() if re.match(pattern, head))
        kind = next(kinds, "damaged, or not a picture of a known format")
        raise UserError(
            f"{name} is {kind}: save it as {READABLE}.",
            message_id="not_a_picture",
            values={"name": name},
        ) from None
    except Exception:  # damaged files make the libraries raise nearly anything
        advice = "save it anew as JPEG or PNG"
        raise UserError(
            f"{name} is damaged, cut short or too unusual: {advice}.",
            message_id="picture_damaged",
            values={"name": name},
        ) from None


def _open(file: BinaryIO, head: bytes) -> ImageFile.ImageFile:
    """The picture, not decoded yet. _TooLarge where it would have too many pixels."""
    if head.startswith(repair.PNG):
        file = repair.without_damaged_chunks(file)
    image = Image.open(file, formats=_FORMATS)
    pixels = image.width * image.height
    if pixels <= MAX_PIXELS:
        return image
    if image.format == "HEIF":
        if pixels <= MAX_HEIC_PIXELS:
            return image
        raise _TooLarge(MAX_HEIC_PIXELS)
    if image.format not in ("JPEG", "MPO"):
        raise _TooLarge
    file.seek(0)
    scans = list(_jpeg_segments(file)).count(0xDA)
    limit = MAX_JPEG_PIXELS if scans == 1 else MAX_PROGRESSIVE_PIXELS
    if pixels > limit or scans * pixels > MAX_SCANS * MAX_PIXELS:
        raise _TooLarge(limit if pixels > limit else MAX_PIXELS)
    scale = next(s for s in (2, 4, 8) if -(-image.width // s) * -(-image.height // s) <= MAX_PIXELS)
    image.draft(None, (image.width // scale, image.height // scale))
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge
    return image


def _loaded(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """The decoded picture, a large HEIC one at half its size; of a JPEG file without its last
    bytes, all but `repair.MOST_MISSING`."""
    try:
        image.load()
        large = image.format == "HEIF" and image.width * image.height > MAX_PIXELS
        return image.reduce(2) if large else image
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
    whole = _open(repair.with_end(file), repair.END_OF_JPEG)
    whole.load()
    if not repair.all_scans_begun(file) or repair.missing_share(whole) > repair.MOST_MISSING:
        raise ValueError
    return whole


def _key(rgb: Image.Image) -> str:
    digest = hashlib.sha256(b"%d x %d\n" % rgb.size)
    for top in range(0, rgb.height, STRIPE):
        digest.update(rgb.crop((0, top, rgb.width, min(top + STRIPE, rgb.height))).tobytes())
    return digest.hexdigest()


def _check_parts(file: BinaryIO, head: bytes) -> None:
    """ValueError where a file has more parts than any sound one: each part costs time."""
    if head.startswith(b"MM\0\x2b"):  # a BigTIFF: libtiff's first directory is not Pillow's
        raise ValueError
    for start, (parts, most, costly, most_costly) in _PARTS.items():
        if head.startswith(start):
            expensive = 0
            for number, kind in enumerate(parts(file), 1):
                expensive += kind in costly
                if number > most or expensive > most_costly:
                    raise ValueError
    file.seek(0)


def _jpeg_segments(file: BinaryIO) -> Iterator[int]:
    """The kinds of a JPEG file's markers before its end."""
    return (kind for kind, _ in repair.jpeg_segments(file.read()))


def _png_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The kinds of a PNG file's chunks."""
    file.seek(8)
    while len(chunk := file.read(8)) == 8:
        yield chunk[4:]
        file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)


def _gif_blocks(file: BinaryIO) -> Iterator[int]:
    """The kind of extension of each block before a GIF file's first frame; 0 for a stray byte."""
    flags = file.read(13)[10]
    if flags & 0x80:
        file.seek(3 << (flags & 7) + 1, os.SEEK_CUR)
    while (byte := file.read(1)) and byte not in b",;":
        kind = file.read(1)[0] if byte == b"!" else 0
        yield kind
        while kind and (length := file.read(1)[0]):
            file.seek(length, os.SEEK_CUR)
            yield kind


# By a file's first bytes: (its parts, most of them, the costly kinds, most of those).
_PARTS = {
    b"\xff\xd8\xff": (_jpeg_segments, MAX_SEGMENTS, (0xDA,), MAX_SCANS),
    b"\x89PNG": (_png_chunks, MAX_PARTS, (b"iCCP", b"iTXt", b"zTXt"), MAX_COMPRESSED),
    b"GIF8": (_gif_blocks, MAX_PARTS, (0xFE,), MAX_COMMENTS),
}


def _load_bounded_directory(
    directory: TiffImagePlugin.ImageFileDirectory_v2, file: IO[bytes]
) -> None:
    """Pillow's `load`, after a check: it copies the data of every tag, and many may share theirs.

    ValueError where the tags' data is longer than the file. Data beyond the file's end is left to
    Pillow, which stops there.
    """
    start = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(start)
    big = directory._bigtiff
    entry = struct.Struct(directory._endian + ("HHQQ" if big else "HHLL"))
    order: Literal["little", "big"] = "little" if directory._endian == "<" else "big"
    tags = int.from_bytes(file.read(8 if big else 2), order)
    if tags > MAX_TAGS:
        raise ValueError
    total = numbers = 0
    entries = file.read(tags * entry.size)
    for place in range(0, len(entries) - entry.size + 1, entry.size):
        tag, kind, count, offset = entry.unpack_from(entries, place)
        size = count * (_TYPE_SIZES[kind] if kind < len(_TYPE_SIZES) else 0)
        if size + offset <= length:
            total += size
            numbers += 0 if kind in _TYPES_OF_BYTES else count
        endless = tag in _TABLES and count > MAX_STRIPS
        if endless or total > length or numbers > MAX_NUMBERS:
            raise ValueError
    file.seek(start)
    _load_directory(directory, file)


# Pillow reads TIFF and EXIF with this while it opens a file, while it loads it, and later.
_Directory = TiffImagePlugin.ImageFileDirectory_v2
_Directory.load = _load_bounded_directory  # type: ignore[method-assign, assignment]


def _check_work(image: ImageFile.ImageFile) -> None:
    """ValueError where decoding would write many more pixels than the picture has."""
    rle = image.format == "BMP" and image.tile[0].codec_name == "bmp_rle"
    if rle and image.width > MAX_RLE_WIDTH:
        raise ValueError
    if image.format == "TIFF":  # strips may overlap; each of four bands may have its own
        boxes = [tile.extents or (0, 0, *image.size) for tile in image.tile]
        drawn = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if drawn > 4 * image.width * image.height:
            raise ValueError


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    with suppress(Exception):  # EXIF is often broken where the picture is sound
        orientation = original.getexif().get(ExifTags.Base.Orientation, 1)
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb
