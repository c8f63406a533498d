"""The one place that opens a user's picture file: it becomes upright sRGB, or a `UserError`."""

import hashlib
import io
import logging
import os
import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, ImageOps

from minigpt4.errors import UserError

MAX_PIXELS = 40_000_000
HELD_PIXELS = 500_000_000  # of all pictures that are in use at one time: 2 GB, at 4 bytes each
DECODED_AT_ONCE = 2  # each may take some hundred megabytes beside its pixels
_STRIPE = 64  # rows that are worked on together
MAX_SCANS = 200  # of a JPEG file; cameras and editors write 1 to 12, each one costs a full pass
READABLE = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF"

# MPO has no entry of its own: Pillow's JPEG opener recognises it. AVIF stands before HEIF because
# both claim files of the brand "mif1", and only AVIF gives the other its turn when it is wrong.
_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF"]
_SUFFIX = re.compile(r"(?i)\.(jpe?g|jpe|jfif|mpo|a?png|webp|avifs?|hei[cf]s?|hif|gif|bmp|tiff?)")
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # others stand within compressed data
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

pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)

_decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)

# What the libraries have to say about an odd file is not for the user's terminal.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture: `rgb` is mode RGB and upright, without metadata.

    `key` is the SHA-256 (64 hex digits) of size and pixels: the same picture in two files has
    one key.
    """

    rgb: Image.Image
    key: str


class _Held:
    """How many pixels all pictures in use have together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pixels = 0

    def take(self, pixels: int) -> None:
        """UserError where that would be too many."""
        with self._lock:
            if self.pixels + pixels > HELD_PIXELS:
                raise UserError(
                    "Too many large pictures are in use at the moment: scale this one down, or "
                    "try again in a minute.",
                    "memory",
                )
            self.pixels += pixels

    def give_back(self, pixels: int) -> None:
        with self._lock:
            self.pixels -= pixels


held = _Held()


def hold(rgb: Image.Image, key: str) -> Picture:
    """The picture of pixels that were taken of `held`, which go back when nobody has it."""
    picture = Picture(rgb, key)
    weakref.finalize(picture, held.give_back, rgb.width * rgb.height).atexit = False
    return picture


def smaller(picture: Picture, side: int) -> Picture:
    """The picture no longer than `side`, under its own key: to be shown and kept."""
    if max(picture.rgb.size) <= side:
        return picture
    rgb = fitted(picture.rgb, side)
    try:
        held.take(rgb.width * rgb.height)
    except UserError:
        return picture
    return hold(rgb, picture.key)


def fitted(rgb: Image.Image, side: int) -> Image.Image:
    """Scaled so that the longer side is `side`; of a thin strip, too, a pixel of width stays."""
    scale = side / max(rgb.size)
    size = [max(1, round(length * scale)) for length in rgb.size]
    return rgb.resize(size, Image.Resampling.BICUBIC)


def load(source: str | os.PathLike | bytes) -> Picture:
    """Open a picture file, or the bytes of one; of an animation, the first frame.

    Raises `UserError` when there is no such file, or it is no readable picture, or it has more
    than `MAX_PIXELS` pixels, which is found before they are decoded; or when all pictures in use
    have too many together.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "The picture")
    path = Path(source)
    name = _shown(path)
    with _file_errors(name):
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise UserError(f"{name} is a folder or a device: name one picture file.")
        with path.open("rb") as file:
            return _decode(file, name)


def list_pictures(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a folder's picture files (told by extension), sorted by name.

    Hidden files and subfolders are left out. Raises `UserError` when there is none.
    """
    path = Path(path)
    name = _shown(path)
    with _file_errors(name):
        path.stat()  # raises where there is nothing
        if not path.is_dir():
            return [path]
        files = [p for p in path.iterdir() if not p.name.startswith(".") and p.is_file()]
    pictures = sorted(p for p in files if _SUFFIX.fullmatch(p.suffix))
    if not pictures:
        raise UserError(f"{name} holds no picture files: choose a folder with {READABLE} files.")
    return pictures


def _shown(path: Path) -> str:
    """The base name, fit to stand in one line on a terminal or a page."""
    name = "".join(c if c.isprintable() and c not in "<>" else "?" for c in path.name)
    return name[:60] + ("…" if len(name) > 60 else "") or "This path"


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} does not exist: check the path and its spelling.") from None
    except PermissionError:
        raise UserError(f"{name} may not be read: change its permissions first.") from None
    except (OSError, ValueError):
        raise UserError(f"{name} cannot be opened: check the path and its disk.") from None


def _decode(file: BinaryIO, name: str) -> Picture:
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise UserError(f"{name} is empty: save or download the picture again.")
    taken = 0
    try:
        with _decoding:
            image = Image.open(file, formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format in ("JPEG", "MPO") and _too_many_scans(file):
                raise ValueError
            held.take(image.width * image.height)
            taken = image.width * image.height
            image.load()
            size = image.width * image.height  # a HEIC file's may be another than it said
            if size > MAX_PIXELS:
                raise Image.DecompressionBombError
            held.take(size - taken)
            taken = size
            rgb = _upright(_on_white(_eight_bit(image)), image)
            picture = hold(rgb, _key(rgb))
            taken = 0
            return picture
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{MAX_PIXELS / 1e6:g} megapixels"
        raise UserError(f"{name} has more than {limit}: scale it down and try again.") from None
    except Image.UnidentifiedImageError:
        kinds = (kind for pattern, kind in _OTHER_KINDS.items() if re.match(pattern, head))
        kind = next(kinds, "damaged, or not a picture of a known format")
        raise UserError(f"{name} is {kind}: save it as {READABLE}.") from None
    except Exception:  # damaged files make the libraries raise nearly anything
        advice = "save it anew as JPEG or PNG"
        raise UserError(f"{name} is damaged, cut short or too unusual: {advice}.") from None
    finally:
        held.give_back(taken)


def _key(rgb: Image.Image) -> str:
    digest = hashlib.sha256(b"%d x %d\n" % rgb.size)
    for top in range(0, rgb.height, _STRIPE):
        digest.update(rgb.crop((0, top, rgb.width, min(top + _STRIPE, rgb.height))).tobytes())
    return digest.hexdigest()


def _too_many_scans(file: BinaryIO) -> bool:
    place = file.tell()
    file.seek(0)
    try:
        return _scans(file.read()) > MAX_SCANS
    finally:
        file.seek(place)


def _scans(data: bytes) -> int:
    """How many scans a JPEG file begins before its end; what stands behind that may be a video."""
    place = count = 0
    while count <= MAX_SCANS and (found := _MARKER.search(data, place)):
        kind, place = found[1][0], found.end()
        if kind == 0xD9:  # the end of the picture
            break
        count += kind == 0xDA
        if kind not in (0x01, 0xD8):  # all others have a length, which counts itself
            place += int.from_bytes(data[place : place + 2], "big")
    return count


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 8 bits: 16 bits from their full range, other depths from their own."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    stripes = [values[top : top + _STRIPE] for top in range(0, len(values), _STRIPE)]
    low, high = 0.0, 65535.0
    if image.mode in ("I", "F"):
        extremes = [(p.min(), p.max()) for s in stripes if (p := s[np.isfinite(s)]).size]
        low, high = float(min(e[0] for e in extremes)), float(max(e[1] for e in extremes))
        if low == high:  # a flat picture has no range: white is 1, or its own value above that
            low, high = min(low, 0.0), max(high, 1.0)
    eight = np.empty(values.shape, np.uint8)
    for place, stripe in enumerate(stripes):  # numpy's copies are eight times as large
        scaled = np.nan_to_num(np.interp(stripe, (low, high), (0, 255)))
        eight[place * _STRIPE : (place + 1) * _STRIPE] = np.rint(scaled)
    grey = Image.fromarray(eight)
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    white = Image.new("RGB", image.size, "white")
    white.paste(_srgb(image), mask=alpha)
    return white


def _srgb(image: Image.Image) -> Image.Image:
    """RGB without alpha; an embedded profile is applied where it is sound and tells of a change."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    with suppress(Exception):  # it may be broken, or meant for other channels
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(embedded):
            target = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(plain, embedded, target, outputMode="RGB")
    return plain.convert("RGB")


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    with suppress(Exception):  # EXIF is often broken where the picture is sound
        orientation = original.getexif().get(ExifTags.Base.Orientation, 1)
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)
