"""Decoded pixels -> upright 8-bit sRGB on white, from any depth, profile and transparency."""

import io
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

LITTLE_USED = 0.25  # of the range of 16 bits: less is stretched
OUTLIERS = 0.1  # percent of the darkest and of the brightest pixels, which may be faulty
MAX_PROFILE = 4_000_000  # bytes; a printer's profile has two or three million
STRIPE = 64  # rows processed together


def upright_rgb(image: Image.Image, original: Image.Image, deep: bool) -> Image.Image:
    """A decoded picture of any depth, profile and transparency -> mode RGB, upright, on white.

    original: has the EXIF data; deep: its file has 16 bits a channel.
    """
    eight = _eight_bit(_brightened(image) if deep else image)
    return _upright(_on_white(eight), original)


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    with suppress(Exception):  # EXIF is often broken where the picture is sound
        orientation = original.getexif().get(ExifTags.Base.Orientation, 1)
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 8 bits: 16 bits from their full range, or from the range that they use if
    that is small, as with thermal cameras and 12-bit sensors; other depths from what they use."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    stripes = [values[top : top + STRIPE] for top in range(0, len(values), STRIPE)]
    low, high = _used_range(values)
    if image.mode not in ("I", "F"):
        low, high = (low, high) if _is_little(high - low, 65535) else (0.0, 65535.0)
    elif low == high:  # nearly all pixels are the same
        extremes = [(p.min(), p.max()) for s in stripes if (p := s[np.isfinite(s)]).size]
        low, high = float(min(e[0] for e in extremes)), float(max(e[1] for e in extremes))
        if low == high:  # a flat picture has no range: white is 1, or its own value above that
            low, high = min(low, 0.0), max(high, 1.0)
    eight = np.empty(values.shape, np.uint8)
    for place, stripe in enumerate(stripes):  # numpy's copies are eight times as large
        scaled = np.nan_to_num(np.interp(stripe, (low, high), (0, 255)))
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
    """A picture that was decoded from 16 bits a channel to 8, stretched if it uses little of them.

    12-bit data in 16-bit files is dark; of their 4096 levels, 16 are left.
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
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    white = Image.new("RGB", image.size, "white")
    white.paste(_srgb(image), mask=alpha)
    return white


def _srgb(image: Image.Image) -> Image.Image:
    """RGB without alpha; an embedded profile is applied where it is sound and not sRGB.

    Profiles with multi-process elements are ignored: any number of them may take minutes to read.
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
