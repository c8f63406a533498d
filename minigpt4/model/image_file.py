"""A picture file of any depth and colours -> pixels. Called through `image.load`.

A hostile file could cost minutes or gigabytes, so there are limits. Slightly damaged files, which
other viewers show, are repaired.
"""

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, BinaryIO, Literal

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, ImagePalette, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngStream

MAX_PIXELS = 40_000_000  # after decoding
MAX_HEIC_PIXELS = 50_000_000  # of a HEIC file, which is then halved: phones' have 48 million
MAX_JPEG_PIXELS = 200_000_000  # of a JPEG file, which can be decoded at a half, fourth or eighth
# For several scans, libjpeg keeps the coefficients of the whole picture, 6 bytes a pixel.
MAX_PROGRESSIVE_PIXELS = 64_000_000
MAX_SCANS = 200  # of a JPEG file; cameras and editors write 1 to 12, each costs a full pass
MAX_SEGMENTS = 1000  # of a JPEG file; joining EXIF segments takes quadratic time
MAX_COMMENTS = 1000  # blocks of 255 bytes of a GIF file; joining them takes quadratic time
MAX_COMPRESSED = 200  # texts and profiles of a PNG file; each may expand to a megabyte
MAX_PARTS = 100_000  # chunks of a PNG file, blocks before the first frame of a GIF
MAX_TAGS = 4096  # of a TIFF or EXIF directory: libtiff's own limit
MAX_NUMBERS = 2**18  # in such a directory; each becomes a Python object
MAX_STRIPS = 2**16  # strips, tiles or colours of a TIFF file; each costs time and memory
MAX_RLE_WIDTH = 65_535  # of a BMP file; four bytes may skip 255 rows, even if it has only one
MOST_MISSING = 0.05  # share of the pixels that may be missing in a file that was cut short
LITTLE_USED = 0.25  # pictures that use a smaller share of the range of 16 bits are stretched
OUTLIERS = 0.1  # percent of the darkest and of the brightest pixels, which are ignored
NEAR_WHITE = 250  # nothing brighter can be seen on white
MAX_PROFILE = 4_000_000  # bytes; a printer's profile has two or three million
STRIPE = 64  # rows processed together

# AVIF comes before HEIF because both claim files of the brand "mif1", and only AVIF's opener lets
# the other try when it fails.
_FORMATS = ["PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF"]  # beside JPEG: see `_open`
_SHOWN_IN_PART = ("PNG", "GIF", "BMP", "TIFF")  # Pillow keeps the part that it could decode
_TYPE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of TIFF's types
_TYPES_OF_BYTES = (1, 2, 7)  # TIFF types that Pillow keeps as bytes, without a Python object each
_TABLES = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.COLORMAP)
_PNG = b"\x89PNG\r\n\x1a\n"
_COMPRESSED, _ANIMATION = (b"iCCP", b"iTXt", b"zTXt"), (b"acTL", b"fcTL", b"fdAT")
_JPEG, _END_OF_JPEG = b"\xff\xd8\xff", b"\xff\xd9"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # others occur within compressed data
_UNDECODED = 128  # libjpeg's grey for pixels without data
_BAND = 8  # rows of a JPEG block

# Pillow checks this first; the limits here depend on the format.
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)

# The user's terminal does not show the libraries' warnings about odd files.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class TooManyPixels(Exception):
    """A picture of more than `limit` pixels."""

    def __init__(self, limit: int = MAX_PIXELS) -> None:
        super().__init__(limit)
        self.limit = limit


# --- opening and decoding -----------------------------------------------------------------------


def opened(file: BinaryIO, head: bytes) -> ImageFile.ImageFile:
    """The picture, not decoded yet. head: the file's first bytes.

    Raises TooManyPixels, ValueError if decoding would take too long, and anything that the
    libraries raise for a damaged file.
    """
    _check_parts(file, head)
    image = _open(file, head)
    _check_work(image)
    return image


def _open(file: BinaryIO, head: bytes) -> ImageFile.ImageFile:
    if head.startswith(_PNG):
        file = _without_damaged_chunks(file)
    if head.startswith(_JPEG):
        # Image.open also reads an MPO file's index of further pictures, and fails if it is damaged.
        file.seek(0)
        image: ImageFile.ImageFile = JpegImageFile(file)
    else:
        image = Image.open(file, formats=_FORMATS)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _have_libtiff_read(image)
        _scale_palette(image)
    pixels = image.width * image.height
    if pixels <= MAX_PIXELS:
        return image
    if image.format == "HEIF":
        if pixels <= MAX_HEIC_PIXELS:
            return image
        raise TooManyPixels(MAX_HEIC_PIXELS)
    if image.format != "JPEG":
        raise TooManyPixels
    file.seek(0)
    scans = list(_jpeg_kinds(file)).count(0xDA)
    limit = MAX_JPEG_PIXELS if scans == 1 else MAX_PROGRESSIVE_PIXELS
    if pixels > limit or scans * pixels > MAX_SCANS * MAX_PIXELS:
        raise TooManyPixels(limit if pixels > limit else MAX_PIXELS)
    scale = next(s for s in (2, 4, 8) if -(-image.width // s) * -(-image.height // s) <= MAX_PIXELS)
    image.draft(None, (image.width // scale, image.height // scale))
    if image.width * image.height > MAX_PIXELS:
        raise TooManyPixels
    return image


def _have_libtiff_read(image: TiffImagePlugin.TiffImageFile) -> None:
    """Change how an uncompressed YCbCr file is read: Pillow expects four bytes a pixel, and
    fails."""
    ycbcr = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 6
    if ycbcr and image.tile and image.tile[0].codec_name == "raw":
        arguments = ("RGBX", "raw", False, image.tag_v2.offset)
        image.tile = [ImageFile._Tile("libtiff", (0, 0, *image.size), 0, arguments)]
        image.use_load_libtiff = True


def _scale_palette(image: TiffImagePlugin.TiffImageFile) -> None:
    """Colours of 16 bits that all fit into 8 have 8, as libtiff reads them: Pillow makes them
    black."""
    colours = image.tag_v2.get(TiffImagePlugin.COLORMAP, ()) if image.mode == "P" else ()
    if colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def decoded(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """The decoded picture, a large HEIC one at half its size. In most formats, the end of the file
    may be missing, with up to `MOST_MISSING` of the pixels."""
    try:
        image.load()
        large = image.format == "HEIF" and image.width * image.height > MAX_PIXELS
        return image.reduce(2) if large else image
    except OSError:
        if image.format in _SHOWN_IN_PART:
            return _beginning(image, file)
        if image.format != "JPEG":
            raise
    file.seek(0)
    data = file.read()
    whole = _open(io.BytesIO(data + _END_OF_JPEG), data)  # so that libjpeg decodes what there is
    whole.load()
    if not _all_scans_begun(data) or _missing_share(whole) > MOST_MISSING:
        raise ValueError
    return whole


# --- limits -------------------------------------------------------------------------------------


def _check_parts(file: BinaryIO, head: bytes) -> None:
    """ValueError if a file has more parts than any valid one has: each part costs time."""
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


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(kind, place of the length) of each marker of a JPEG file before its end marker, after which
    there may be a video."""
    place = 0
    while (found := _MARKER.search(data, place)) and found[1] != b"\xd9":
        kind, place = found[1][0], found.end()
        yield kind, place
        # A segment's length counts itself; markers below 0xC0 have none, and libjpeg skips them.
        if kind >= 0xC0 and kind != 0xD8:
            place += int.from_bytes(data[place : place + 2], "big")


def _jpeg_kinds(file: BinaryIO) -> Iterator[int]:
    """The kinds of a JPEG file's markers before its end."""
    return (kind for kind, _ in _jpeg_segments(file.read()))


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


# A file's first bytes -> (function that lists its parts, their limit, costly kinds, their limit).
_PARTS = {
    b"\xff\xd8\xff": (_jpeg_kinds, MAX_SEGMENTS, (0xDA,), MAX_SCANS),
    b"\x89PNG": (_png_chunks, MAX_PARTS, _COMPRESSED, MAX_COMPRESSED),
    b"GIF8": (_gif_blocks, MAX_PARTS, (0xFE,), MAX_COMMENTS),
}

_Directory = TiffImagePlugin.ImageFileDirectory_v2
_load_directory = _Directory.load


def _load_bounded_directory(directory: _Directory, file: IO[bytes]) -> None:
    """Pillow's `load` after a check: `load` copies each tag's data, which many tags may share.

    ValueError if the tags' data is longer than the file. Data beyond the file's end is left to
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


# Pillow calls this for TIFF and EXIF when it opens a file, when it loads the file, and later.
_Directory.load = _load_bounded_directory  # type: ignore[method-assign, assignment]


def _check_work(image: ImageFile.ImageFile) -> None:
    """ValueError if decoding would write many more pixels than the picture has."""
    rle = image.format == "BMP" and image.tile[0].codec_name == "bmp_rle"
    if rle and image.width > MAX_RLE_WIDTH:
        raise ValueError
    if image.format == "TIFF":  # strips may overlap; each of four bands may have its own
        boxes = [tile.extents or (0, 0, *image.size) for tile in image.tile]
        drawn = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if drawn > 4 * image.width * image.height:
            raise ValueError


# --- damaged files ------------------------------------------------------------------------------


def _without_damaged_chunks(file: BinaryIO) -> BinaryIO:
    """A PNG file without the ancillary chunks that libpng ignores: of wrong checksum or content.

    The file itself if there are none. A chunk of the picture itself is never left out.
    """
    file.seek(len(_PNG))
    damaged = []
    while len(head := file.read(8)) == 8:
        start, length = file.tell() - 8, int.from_bytes(head[:4], "big")
        if not head[4] & 0x20:  # critical: the decoder checks it
            file.seek(length + 4, io.SEEK_CUR)
            continue
        body, checksum = file.read(length), file.read(4)
        wrong = zlib.crc32(head[4:] + body) != int.from_bytes(checksum, "big")
        if len(checksum) == 4 and (wrong or not _is_readable(head[4:], body)):
            damaged.append((start, file.tell()))
    file.seek(0)
    if not damaged:
        return file
    data, kept, place = file.read(), [], 0
    for start, end in damaged:
        kept.append(data[place:start])
        place = end
    return io.BytesIO(b"".join([*kept, data[place:]]))


def _is_readable(kind: bytes, body: bytes) -> bool:
    """Whether Pillow can read an ancillary chunk of a PNG file, or skips its kind."""
    if kind in _ANIMATION:  # these depend on each other
        return True
    try:
        PngStream(io.BytesIO(body)).call(kind, 0, len(body))
    except AttributeError:  # a kind that Pillow does not know
        return True
    except ValueError:  # of compressed data: there are too many, and the picture is to be refused
        return kind in _COMPRESSED
    except Exception:  # it raises nearly anything
        return False
    return True


def _beginning(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """The decoded part of a file without its last bytes; the rest is black or transparent.

    ValueError if the rest is more than `MOST_MISSING`. To find the rest, the file is decoded again
    over white: the two results differ there.
    """
    file.seek(0)
    again = _open(file, file.read(len(_PNG)))
    bands = len(again.getbands())
    again.im = Image.new(again.mode, again.size, 255 if bands == 1 else (255,) * bands).im
    if again.format == "GIF":
        again._frame_transparency = None  # type: ignore[attr-defined] # it would replace the white
    with suppress(OSError):
        again.load()
    image.tile, again.tile = [], []  # mark both as decoded
    missing = 0
    for top in range(0, image.height, STRIPE):
        box = (0, top, image.width, min(top + STRIPE, image.height))
        different = np.asarray(image.crop(box)) != np.asarray(again.crop(box))
        missing += int((different.any(2) if different.ndim == 3 else different).sum())
    if image.im.size != image.size or missing > MOST_MISSING * image.width * image.height:
        raise ValueError
    return image


def _all_scans_begun(data: bytes) -> bool:
    """Whether a JPEG file has, at least in part, the last scan of each coefficient.

    A progressive file that ends earlier shows the whole picture, but without details.
    """
    open_coefficients: set[tuple[int, int]] = set()  # (component, number of the coefficient)
    for kind, place in _jpeg_segments(data):
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


def _missing_share(image: Image.Image) -> float:
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


# --- colours: decoded pixels -> upright 8-bit sRGB without transparency --------------------------


def upright_rgb(image: Image.Image, original: Image.Image, deep: bool) -> Image.Image:
    """A decoded picture of any depth, profile and transparency -> mode RGB, upright, on white.

    original: has the EXIF data; deep: its file has 16 bits a channel.
    """
    eight = _eight_bit(_brightened(image) if deep else image, getattr(original, "tag_v2", {}))
    return _upright(_on_white(eight), original)


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    with suppress(Exception):  # EXIF is often broken in a valid picture
        orientation = original.getexif().get(ExifTags.Base.Orientation, 1)
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _eight_bit(image: Image.Image, tags: Mapping[int, object]) -> Image.Image:
    """A deep grey picture scaled to 8 bits. 16 bits are scaled from their full range, or from the
    range in use if that is small, as with thermal cameras and 12-bit sensors; other depths always
    from the range in use. tags: of a TIFF file."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "I" and tags and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow makes large numbers negative
    negative = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # 0 is white
    stripes = [values[top : top + STRIPE] for top in range(0, len(values), STRIPE)]
    low, high = _used_range(values)
    if image.mode not in ("I", "F"):
        low, high = (low, high) if _is_little(high - low, 65535) else (0.0, 65535.0)
    elif low == high:  # nearly all pixels are the same
        extremes = [(p.min(), p.max()) for s in stripes if (p := s[np.isfinite(s)]).size]
        low, high = float(min(e[0] for e in extremes)), float(max(e[1] for e in extremes))
        if low == high:  # a flat picture has no range: white is 1, or its value if that is higher
            low, high = min(low, 0.0), max(high, 1.0)
    eight = np.empty(values.shape, np.uint8)
    for place, stripe in enumerate(stripes):  # in stripes: numpy's copies take 8 bytes a number
        scaled = np.nan_to_num(np.interp(stripe, (low, high), (255, 0) if negative else (0, 255)))
        eight[place * STRIPE : (place + 1) * STRIPE] = np.rint(scaled)
    grey = Image.fromarray(eight)
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def _used_range(values: np.ndarray) -> tuple[float, float]:
    """The range that values use, without outliers and infinities."""
    step = max(1, round((values.size / 1e6) ** 0.5))
    sample = values[::step, ::step]
    sample = sample[np.isfinite(sample)]
    low = float(np.percentile(sample, OUTLIERS, method="lower"))
    return low, float(np.percentile(sample, 100 - OUTLIERS, method="higher"))


def _is_little(used: float, whole: float) -> bool:
    return 0 < used < LITTLE_USED * whole


def _brightened(image: Image.Image) -> Image.Image:
    """A picture decoded from 16 bits a channel to 8, stretched if it uses a small part of the
    range.

    12-bit data in 16-bit files is dark: 16 of its 4096 levels are left.
    """
    count = {"RGB": 3, "RGBA": 3, "LA": 1}.get(image.mode, 0)  # without alpha
    if not count:
        return image
    shares = np.reshape(image.histogram(), (-1, 256))[:count].sum(0).cumsum()
    shares = shares / shares[-1]
    low = int(np.searchsorted(shares, OUTLIERS / 100, "right"))
    high = int(np.searchsorted(shares, 1 - OUTLIERS / 100))
    if not _is_little(high - low, 255):
        return image
    bands = image.split()
    table = np.rint(np.interp(range(256), (low, high), (0, 255))).astype(int).tolist()
    coloured = [band.point(table) for band in bands[:count]]
    stretched = Image.merge(image.mode, [*coloured, *bands[count:]])
    stretched.info.update(image.info)
    return stretched


def _on_white(image: Image.Image) -> Image.Image:
    """The picture on white; on black if all that is not transparent in it is white."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    rgb, white = _srgb(image), Image.new("RGB", image.size, "white")
    white.paste(rgb, mask=alpha)
    if alpha and alpha.getextrema()[1] and np.min(white.getextrema()) >= NEAR_WHITE:
        white.paste("black", (0, 0, *image.size))
        white.paste(rgb, mask=alpha)
    return white


def _srgb(image: Image.Image) -> Image.Image:
    """RGB without alpha. An embedded profile is applied if it is valid and not sRGB.

    Profiles with multi-process elements are ignored: many of these could take minutes to read.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    with suppress(Exception):  # the profile may be broken, or for other channels
        if len(profile) <= MAX_PROFILE and b"mpet" not in profile:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(embedded):
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(plain, embedded, target, outputMode="RGB")
                if converted is not None:
                    return converted
    return plain.convert("RGB")
