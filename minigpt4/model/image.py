"""The one place that opens a user's picture file: it becomes upright sRGB, or a `UserError`."""

import base64
import hashlib
import io
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from minigpt4.errors import UserError
from minigpt4.model import image_file
from minigpt4.model.image_file import STRIPE, TooManyPixels

HELD_PIXELS = 500_000_000  # of all pictures in use at a time: 2 GB, at 4 bytes each
UNPACKED_PIXELS = 300_000  # pictures in history up to this size are not packed: about a megabyte
DECODED_AT_ONCE = 2  # each may take some hundred megabytes beside its pixels
DECODING_WAIT = 60.0  # seconds to wait for a turn to decode
BUSY = "Too many pictures are being opened at the moment: try again in a minute."
NO_NAME = "The name of a picture is empty: check the variable that it comes from."
READABLE = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF"

_SUFFIX = re.compile(r"(?i)\.(jpe?g|jpe|jfif|mpo|a?png|webp|avifs?|hei[cf]s?|hif|gif|bmp|tiff?)")
_OTHER_KINDS = {
    rb"(?is).*(<!doctype html|<html)": "a web page",
    rb"(?is).*<svg": "an SVG drawing",
    rb"version https://git-lfs": "a Git LFS pointer, not a picture (run “git lfs pull”)",
    rb"%PDF": "a PDF document",
    rb"%!PS|\xc5\xd0\xd3\xc6": "an EPS or PostScript document",
    rb"8BPS": "a Photoshop document",
    rb"SIMPLE  =": "a FITS file",
    rb"\x00\x00\x01\x00": "an icon file",
    rb"\x00\x00\x00\x0c(jP  |JXL )|\xff[\x4f\x0a]": "a JPEG 2000 or JPEG XL picture",
    rb"PK\x03\x04": "a ZIP archive or an office document",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!": "a compressed file",
    rb"(II|MM)(\*\0|\0\*)": "a TIFF file of an unusual kind, or a camera's raw file",
    rb"FUJIFILMCCD|II(R[OS]|U\0)": "a camera's raw file",
    rb"(\xef\xbb\xbf)?\s*(<\?xml|[\[{]\s*[\"{])": "a text, such as an error message of a website",
    rb"data:image/|/9j/|iVBORw0KGgo|R0lGOD|UklGR": "text in base64, not decoded yet",
    # As UTF-8 or as Latin-1.
    rb"(\xef\xbf\xbd){2}|\xef\xbf\xbdPNG|\xc3\xbf\xc3\x98|\xc2\x89PNG": "a picture that "
    "was read as text, not as bytes",
    rb"(?s).{4}ftyp(?!hei|hev|mif1|msf1|avi)|\x1a\x45\xdf\xa3": "a video or a camera's raw file",
}

_decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)


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
    pixels are needed, which is seldom: engines keep embeddings by the key."""

    _content: bytes

    def __init__(self, content: bytes, key: str) -> None:
        object.__setattr__(self, "_content", content)
        object.__setattr__(self, "key", key)

    @property
    def rgb(self) -> Image.Image:
        """The picture, decoded at each call."""
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
    """An encoded picture, as the language model gets it.

    embeds: float32 [image_tokens, llm_hidden_size]. words: the word head's list, "" if there is
    none. objects: the objects that a detector found, the surest first, if the model has one.
    """

    embeds: np.ndarray
    words: str = ""
    objects: tuple[Detection, ...] = ()


class _Held:
    """Counts the pixels of all pictures in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pixels = 0
        # A picture's finaliser gives its pixels back. The garbage collector may run it anywhere,
        # even inside the locked regions below, so it takes no lock: it only appends.
        self._returned: deque[int] = deque()

    @property
    def pixels(self) -> int:
        """The pixels in use now."""
        with self._lock:
            return self._settle()

    def take(self, pixels: int) -> None:
        """Count `pixels` more; UserError if that is too many."""
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
    """A picture whose pixels are counted in `held` already. They are given back once nothing refers
    to it."""
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
    """The picture, scaled so that its longer side is `side`. A thin strip stays a pixel wide."""
    scale = side / max(rgb.size)
    size = [max(1, round(length * scale)) for length in rgb.size]
    return rgb.resize(size, Image.Resampling.BICUBIC)


def data_url(picture: Picture, side: int) -> str:
    """The picture as a JPEG `data:` URL, scaled down to at most `side` pixels."""
    small = picture.rgb.copy()
    small.thumbnail((side, side))
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(small)).decode()


def jpeg(rgb: Image.Image, quality: int = 90) -> bytes:
    """A JPEG file's content."""
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=quality)
    return file.getvalue()


def load(source: str | os.PathLike | bytes, whole_path: bool = False) -> Picture:
    """Open a picture file, or the bytes of one; of an animation, the first frame.

    whole_path: error messages show the path as given, not only the base name.

    A larger JPEG of up to `MAX_JPEG_PIXELS` is decoded at a smaller scale, and a larger HEIC of up
    to `MAX_HEIC_PIXELS` is scaled down (see `image_file`). UserError if the file does not exist, is
    not a readable picture, has more than `MAX_PIXELS` pixels (checked before decoding), or if all
    pictures in use together have too many.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "The picture")
    if source == "":
        raise UserError(NO_NAME)
    path = Path(source)
    name = shown_name(path, whole_path)
    if _is_address(path):
        raise UserError(f"{name} is on the web: save the picture, then name the file.")
    with _file_errors(name):
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise UserError(f"{name} is a folder, a pipe or a device: name one picture file.")
        with path.open("rb") as file:
            return _decode(file, name)


def has_picture_name(name: str) -> bool:
    """Whether the name has the extension of a picture format that `load` opens."""
    return bool(_SUFFIX.fullmatch(os.path.splitext(name)[1]))


def list_pictures(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a folder's picture files (by extension), sorted by name.

    Hidden files and subfolders are skipped. UserError if there are no pictures.
    """
    if path == "":
        raise UserError(NO_NAME)
    path = Path(path)
    name = shown_name(path, whole=True)
    if _is_address(path):
        return [path]  # `load` reports that it is not a file of this computer
    with _file_errors(name):
        path.stat()  # raises if nothing exists there
        if not path.is_dir():
            return [path]
        files = [p for p in path.iterdir() if not p.name.startswith(".") and p.is_file()]
    pictures = sorted(p for p in files if has_picture_name(p.name))
    if not pictures:
        raise UserError(f"{name} holds no picture files: choose a folder with {READABLE} files.")
    return pictures


def _is_address(path: Path) -> bool:
    return re.match("https?:", str(path), re.IGNORECASE) is not None


def shown_name(path: Path, whole: bool = False) -> str:
    """The base name, or the whole path, made safe for one line on a terminal or a page."""
    shown, most = (str(path), 200) if whole else (path.name, 60)
    name = "".join(c if c.isprintable() and c not in "<>" else "?" for c in shown)
    return name[:most] + ("…" if len(name) > most else "") or "This path"


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
    """One of the `DECODED_AT_ONCE` turns; UserError if none is free within DECODING_WAIT."""
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
        raise _refusal(
            name, "is empty: save or download the picture again.", message_id="picture_empty"
        )
    with _picture_errors(name, head), _turn():
        image = image_file.opened(file, head)
        return _converted(image, lambda: image_file.decoded(image, file))


def convert(opened: Image.Image) -> Picture:
    """As `load`, for a picture that Pillow has opened or made, which is not changed."""

    def copied() -> Image.Image:
        if _is_closed(opened):
            raise UserError("The Pillow image is closed: open it again.")
        opened.load()
        return opened.copy()

    with _picture_errors("The picture", b""), _turn():
        if 0 in opened.size:
            raise ValueError
        if opened.width * opened.height > image_file.MAX_PIXELS:
            raise TooManyPixels
        return _converted(opened, copied, opened)


def _is_closed(opened: Image.Image) -> bool:
    """Is a Pillow image closed, or was its file closed before it was read?"""
    if getattr(opened, "tile", None):
        file = getattr(opened, "fp", None)
        return file is None or getattr(file, "closed", False)
    try:
        return opened.im is None
    except ValueError:
        return True


def _converted(
    image: Image.Image, decode: Callable[[], Image.Image], original: Image.Image | None = None
) -> Picture:
    """The decoded `image` as a picture in upright RGB. original: the image with the EXIF data; by
    default the decoded one."""
    taken = 0
    try:
        held.take(image.width * image.height)
        taken = image.width * image.height
        deep = ";16" in str(getattr(image, "tile", ""))  # only known before it is decoded
        image = decode()
        size = image.width * image.height  # a HEIC file may declare another one
        if size > image_file.MAX_PIXELS:
            raise TooManyPixels
        held.take(size - taken)
        taken = size
        rgb = image_file.upright_rgb(image, original or image, deep)
        picture = hold(rgb, _key(rgb))
        taken = 0
        return picture
    finally:
        held.give_back(taken)


@contextmanager
def _picture_errors(name: str, head: bytes) -> Iterator[None]:
    """Turns any error of the libraries into a UserError. head: the file's first bytes."""
    try:
        yield
    except UserError:
        raise
    except (TooManyPixels, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{getattr(error, 'limit', image_file.MAX_PIXELS) / 1e6:g}"
        what = f"has more than {limit} megapixels: scale it down and try again."
        raise _refusal(name, what, message_id="picture_too_large", megapixels=limit) from None
    except Image.UnidentifiedImageError:
        kinds = (kind for pattern, kind in _OTHER_KINDS.items() if re.match(pattern, head))
        kind = next(kinds, "damaged, or not a picture of a known format")
        raise _refusal(
            name, f"is {kind}: save it as {READABLE}.", message_id="not_a_picture"
        ) from None
    except Exception:  # damaged files make the libraries raise nearly anything
        what = "is damaged, cut short or too unusual: save it again as JPEG or PNG."
        raise _refusal(name, what, message_id="picture_damaged") from None


def _refusal(name: str, what: str, message_id: str, **values: object) -> UserError:
    """The error for the picture `name`; the sentence begins with the name."""
    return UserError(f"{name} {what}", message_id=message_id, values={"name": name, **values})


def _key(rgb: Image.Image) -> str:
    digest = hashlib.sha256(b"%d x %d\n" % rgb.size)
    for top in range(0, rgb.height, STRIPE):
        digest.update(rgb.crop((0, top, rgb.width, min(top + STRIPE, rgb.height))).tobytes())
    return digest.hexdigest()
