"""Pictures as people have them, made here as real files and read back."""

import base64
import gc
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from minigpt4.errors import UserError
from minigpt4.model import image as image_module
from minigpt4.model import image_file
from minigpt4.model.image import held, hold, list_pictures, load

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (20, 160, 40), (30, 40, 210), (240, 220, 20)
WHITE = (255, 255, 255)
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "MPO"]


def quarters(width=64, height=48):
    """Four flat quarters: red, green / blue, yellow."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(YELLOW, (width // 2, height // 2, width, height))
    return image


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width=64, height=48):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(width, height, depth=8, colour=2, data=b""):
    """A PNG file written by hand, so that its header can claim anything."""

    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(picture):
    return np.asarray(picture.rgb).astype(int)


def assert_colour(picture, expected, tolerance=0, at=(0, 0)):
    got = np.array(picture.rgb.getpixel(at), int)
    assert np.abs(got - expected).max() <= tolerance, f"{got} is not {expected}"


def refusal(source):
    """The sentence that refuses a source, checked to be fit for a user's eyes."""
    with pytest.raises(UserError) as caught:
        load(source)
    sentence = str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not any(bad in sentence for bad in ("0x", "<", "\n", "/", "Traceback", "Error"))
    assert sentence.endswith(".") and sentence[:-1].count(". ") == 0
    return sentence


# What is read


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.trust("Pictures", "every supported format, HEIC and AVIF among them")
def test_format(format, tmp_path):
    path = tmp_path / "picture.bin"  # the name says nothing: the content decides
    options = {} if format in ("GIF", "BMP", "TIFF", "PNG") else {"quality": 95}
    quarters().save(path, format, **options)
    picture = load(path)
    assert picture.rgb.mode == "RGB" and picture.rgb.size == (64, 48) and not picture.rgb.info
    for at, colour in [((8, 8), RED), ((56, 8), GREEN), ((8, 40), BLUE), ((56, 40), YELLOW)]:
        assert_colour(picture, colour, tolerance=8, at=at)


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_generic_brand(format):
    data = encoded(quarters(), format, quality=95)
    assert_colour(load(data[:8] + b"mif1" + data[12:]), RED, tolerance=8, at=(8, 8))


def test_path_string_and_bytes_are_the_same_picture(tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    keys = {load(source).key for source in (path, str(path), path.read_bytes())}
    assert len(keys) == 1 and len(keys.pop()) == 64


def test_key_follows_pixels_and_size():
    key = load(encoded(noise(), "PNG")).key
    assert load(encoded(noise(), "BMP")).key == load(encoded(noise(), "TIFF")).key == key
    other = noise()
    other.putpixel((3, 3), (1, 2, 3))
    assert load(encoded(other, "PNG")).key != key
    wide, tall = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    assert load(encoded(wide, "PNG")).key != load(encoded(tall, "PNG")).key


# Orientation

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})],
)
@pytest.mark.trust("Pictures", "all EXIF orientations, and broken EXIF")
def test_orientation(orientation, format, options):
    stored = quarters()
    picture = load(encoded(stored, format, exif=turned(orientation), **options))
    expected = UPRIGHT[orientation](np.asarray(stored).astype(int))
    assert pixels(picture).shape == expected.shape
    difference = np.abs(pixels(picture) - expected)
    assert difference.mean() < 3 if format == "JPEG" else not difference.any()


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
@pytest.mark.trust("Pictures", "all EXIF orientations, and broken EXIF")
def test_orientation_is_applied_once(orientation, format):
    # Both writers turn this EXIF into a property of the container, which its decoder may apply.
    exif = turned(orientation).tobytes()
    picture = load(encoded(quarters(), format, exif=exif, quality=95))
    expected = UPRIGHT[orientation](np.asarray(quarters()).astype(int))
    assert pixels(picture).shape == expected.shape
    assert np.abs(pixels(picture) - expected).mean() < 6


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0not a header at all",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12",
        b"Exif\0\0" + turned(99).tobytes()[6:],
    ],
)
@pytest.mark.trust("Pictures", "all EXIF orientations, and broken EXIF")
def test_broken_exif_does_no_harm(format, exif):
    assert load(encoded(quarters(), format, exif=exif)).rgb.size == (64, 48)


def test_a_large_heic_is_kept_at_half_its_size(monkeypatch):
    monkeypatch.setattr(image_file, "MAX_PIXELS", 3000)
    monkeypatch.setattr(image_file, "MAX_HEIC_PIXELS", 4000)
    before = image_module.held.pixels
    picture = load(encoded(quarters().resize((80, 48)), "HEIF", quality=95))
    assert picture.rgb.size == (40, 24) and image_module.held.pixels - before == 40 * 24
    whole = load(encoded(quarters().resize((40, 24)), "HEIF", quality=95))
    difference = np.abs(np.asarray(picture.rgb, int) - np.asarray(whole.rgb, int))
    assert difference.mean() < 12
    with pytest.raises(UserError, match="more than 0.004 megapixels"):
        load(encoded(quarters().resize((80, 60)), "HEIF"))


# Transparency


def half_clear(mode, colour, clear):
    image = Image.new(mode, (8, 4), colour)
    image.paste(clear, (0, 0, 4, 4))
    return image


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_alpha_becomes_white(format):
    image = half_clear("RGBA", (*RED, 255), (0, 0, 0, 0)).resize((64, 32), Image.Resampling.NEAREST)
    options = {"lossless": True} if format == "WEBP" else {"quality": 95}
    picture = load(encoded(image, format, **options))
    assert_colour(picture, WHITE, tolerance=4, at=(4, 16))
    assert_colour(picture, RED, tolerance=8, at=(56, 16))


def test_half_transparent_is_mixed_with_white():
    picture = load(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))
    assert_colour(picture, (127, 127, 127), tolerance=1)


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (half_clear("LA", (90, 255), (0, 0)), {}, (90, 90, 90)),
        (half_clear("RGB", RED, BLUE), {"transparency": BLUE}, RED),
        (half_clear("L", 90, 10), {"transparency": 10}, (90, 90, 90)),
        (half_clear("1", 0, 255), {"transparency": 255}, (0, 0, 0)),
    ],
    ids=["LA", "RGB", "L", "1"],
)
def test_transparency_in_png(image, options, colour):
    picture = load(encoded(image, "PNG", **options))
    assert_colour(picture, WHITE, at=(1, 1))
    assert_colour(picture, colour, at=(6, 1))


@pytest.mark.parametrize(("format", "transparency"), [("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)])
@pytest.mark.trust("Pictures", "16 bits, CMYK, LAB, 1 bit, palettes with transparency")
def test_transparency_in_palette(format, transparency):
    image = Image.new("P", (8, 4), 1)
    image.putpalette([*BLUE, *RED])
    image.paste(0, (0, 0, 4, 4))
    picture = load(encoded(image, format, transparency=transparency))
    assert_colour(picture, WHITE, at=(1, 1))
    assert_colour(picture, RED, at=(6, 1))


def test_palette_with_degrees_of_transparency():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert_colour(load(encoded(image, "PNG", transparency=b"\x80\xff")), (127,) * 3, tolerance=1)


def test_white_alone_is_shown_on_black():
    logo = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    empty = load(encoded(logo, "PNG"))
    assert_colour(empty, WHITE)
    logo.paste(WHITE, (0, 0, 4, 8))
    picture = load(encoded(logo, "PNG"))
    assert_colour(picture, WHITE, at=(1, 1))
    assert_colour(picture, (0, 0, 0), at=(6, 1))


# Depth and colour spaces


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
@pytest.mark.trust("Pictures", "16 bits, CMYK, LAB, 1 bit, palettes with transparency")
def test_sixteen_bits_are_scaled(format, kind):
    values = np.array([[0, 257, 25700, 32896, 65535]], kind)
    mode = "I;16" if kind == "<u2" else "I;16B"
    image = Image.frombytes(mode, (5, 1), values.tobytes())
    assert pixels(load(encoded(image, format)))[0, :, 0].tolist() == [0, 1, 100, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 100_000, 200_000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[-3, 7, 17]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0, 10]], np.float32), [0, 0, 255]),
        (np.array([[-np.inf, 0, 10, np.inf]], np.float32), [0, 0, 255, 255]),
        (np.full((1, 3), 0.5, np.float32), [128, 128, 128]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
        (np.full((1, 3), 9000, np.int32), [255, 255, 255]),
    ],
)
def test_wide_grey_is_scaled_by_its_own_range(values, expected):
    picture = load(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(pixels(picture)[0, :, 1] - expected).max() <= 1


@pytest.mark.parametrize(("kind", "mode"), [("<u2", "I;16"), ("<f4", "F")])
def test_deep_grey_whose_zero_is_white(kind, mode):
    """As scanners and X-ray machines write it."""
    values = np.array([[0, 32896, 65535]], kind)
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    data = encoded(image, "TIFF", tiffinfo={262: 0})
    assert np.abs(pixels(load(data))[0, :, 1] - [255, 127, 0]).max() <= 1


def test_numbers_of_32_bits_without_a_sign():
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    data = encoded(Image.frombytes("I", (3, 1), values.tobytes()), "TIFF")
    signed, unsigned = (struct.pack("<HHII", 339, 3, 1, sign) for sign in (2, 1))
    data = data.replace(signed, unsigned)
    assert np.abs(pixels(load(data))[0, :, 1] - [0, 128, 255]).max() <= 1


def test_colours_of_a_palette_in_the_lower_8_bits():
    image = quarters().quantize(4)
    data = encoded(image, "TIFF")
    wide = Image.open(io.BytesIO(data)).tag_v2[320]
    narrow = [colour // 256 for colour in wide]
    numbers = struct.Struct(f"<{len(wide)}H")
    data = data.replace(numbers.pack(*wide), numbers.pack(*narrow))
    assert_colour(load(data), RED, 3, at=(8, 8))


@pytest.mark.parametrize(("format", "tolerance"), [("JPEG", 3), ("TIFF", 0)])
@pytest.mark.trust("Pictures", "16 bits, CMYK, LAB, 1 bit, palettes with transparency")
def test_cmyk(format, tolerance):
    red, paper = Image.new("CMYK", (16, 16), (0, 255, 255, 0)), Image.new("CMYK", (16, 16))
    assert_colour(load(encoded(red, format)), (255, 0, 0), tolerance, at=(8, 8))
    assert_colour(load(encoded(paper, format)), WHITE, tolerance, at=(8, 8))


@pytest.mark.trust("Pictures", "16 bits, CMYK, LAB, 1 bit, palettes with transparency")
def test_lab():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(quarters(), srgb, lab, outputMode="LAB")
    assert image.mode == "LAB"
    assert_colour(load(encoded(image, "TIFF")), RED, tolerance=4, at=(8, 8))


@pytest.mark.parametrize("compression", ["tiff_lzw", None])
@pytest.mark.parametrize("mode", ["YCbCr", "P", "L", "1"])
@pytest.mark.trust("Pictures", "16 bits, CMYK, LAB, 1 bit, palettes with transparency")
def test_other_modes(mode, compression):
    image = quarters().convert(mode)
    picture = load(encoded(image, "TIFF", compression=compression))
    assert_colour(picture, image.convert("RGB").getpixel((8, 8)), tolerance=3, at=(8, 8))


def swapped_profile():
    """A profile in which red and blue trade places, so that its use is plain to see."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))
    return data.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profile_is_applied(mode):
    image = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    picture = load(encoded(image, "PNG", icc_profile=swapped_profile()))
    assert_colour(picture, (0, 0, 255), tolerance=2)


def test_profile_keeps_transparency():
    image = half_clear("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    picture = load(encoded(image, "PNG", icc_profile=swapped_profile()))
    assert_colour(picture, WHITE, at=(1, 1))
    assert_colour(picture, (0, 0, 255), tolerance=2, at=(6, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "1", "I;16"])
@pytest.mark.parametrize("profile", [b"junk", swapped_profile()[:300]])
def test_broken_profile_does_no_harm(mode, profile):
    image = Image.new(mode, (4, 4))
    assert load(encoded(image, "PNG", icc_profile=profile)).key == load(encoded(image, "PNG")).key


# Animations


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_first_frame_only(format):
    frames = [Image.new("RGB", (32, 32), c) for c in (RED, GREEN, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert_colour(load(data), RED, tolerance=8, at=(16, 16))


# What is refused


@pytest.mark.parametrize(("width", "height"), [(8000, 5001), (10_000, 10_000), (60_000, 60_000)])
@pytest.mark.trust("Pictures", "headers that claim 20,000 × 20,000 pixels and more")
def test_too_large_is_refused_before_decoding(width, height, tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png(width, height))
    monkeypatch.delattr(image_file, "decoded")
    assert "huge.png has more than 40 megapixels" in refusal(path)


def test_no_pixels():
    refusal(png(0, 8))


@pytest.mark.parametrize("format", FORMATS)
def test_cut_short_anywhere(format):
    data = encoded(noise(), format)
    for length in np.linspace(1, len(data) - 1, 50).astype(int).tolist():
        try:
            assert load(data[:length]).rgb.size == (64, 48)
        except UserError as error:
            assert not any(bad in str(error) for bad in ("0x", "<", "\n"))
    assert "damaged" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.trust("Pictures", "truncated at every offset, or damaged")
def test_damaged_anywhere(format):
    data = encoded(quarters(), format)
    random = np.random.default_rng(1)
    for _ in range(25):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4).tolist():
            broken[place] = int(random.integers(256))
        try:
            load(bytes(broken))
        except UserError as error:
            assert not any(bad in str(error) for bad in ("0x", "<", "\n"))


STARTS = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8 "]
STARTS += [b"BM", b"II*\0\x08\0\0\0", b"MM\0*", b"\0\0\0\x1cftypheic", b"\0\0\0\x20ftypavif"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STARTS), st.binary(min_size=1, max_size=200))
@example(b"", b"\0")
@pytest.mark.trust("Pictures", "empty files and random bytes")
def test_random_bytes_are_refused(start, rest):
    refusal(start + rest)


def test_text_bomb_is_refused():
    text = zlib.compress(bytes(70_000_000), 9)
    body = b"zTXtkey\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = png(1, 1, data=bytes(4))
    refusal(data[:33] + chunk + data[33:])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html><svg></svg></html>", "a web page"),
        (b"%PDF-1.7\n%", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "an EPS or PostScript document"),
        (b"8BPS\0\1\0\0\0\0\0\0", "a Photoshop document"),
        (b"\0\0\1\0\1\0\x10\x10", "an icon file"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 or JPEG XL picture"),
        (b"\xff\x0a\x7f\x01", "a JPEG 2000 or JPEG XL picture"),
        (b"PK\x03\x04\x14\0", "a ZIP archive or an office document"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video or a camera's raw file"),
        (base64.b64encode(png(1, 1, data=bytes(4))), "text in base64"),
        (
            png(1, 1, data=bytes(4)).decode("utf-8", "replace").encode(),
            "a picture that was read as text",
        ),
        (b"\xff\xd8\xff\xe0".decode("latin-1").encode(), "a picture that was read as text"),
        (b"\x1f\x8b\x08\0", "a compressed file"),
        (b"II*\0\x10\0\0\0CR\2\0", "a TIFF file of an unusual kind, or a camera's raw file"),
        (b"IIRO\x08\0\0\0", "a camera's raw file"),
        (b'{"error": "not found"}', "a text, such as an error message"),
        (b"<?xml version='1.0'?><Error/>", "a text, such as an error message"),
        (b"P6 2 2 255\n" + bytes(12), "damaged, or not a picture of a known format"),
        (b"just some text", "damaged, or not a picture of a known format"),
        (b"\0\0\0\x1cftypheic\0\0", "damaged, or not a picture of a known format"),
    ],
)
def test_other_kinds_are_named(data, kind, tmp_path):
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    sentence = refusal(path)
    assert sentence.startswith(f"thing.png is {kind}") and "JPEG, PNG, WebP" in sentence


@pytest.mark.trust("Pictures", "empty files and random bytes")
def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(tmp_path / "gone.jpg").startswith("gone.jpg does not exist")
    assert "does not exist" in refusal(empty / "inside.jpg")
    assert refusal(tmp_path).startswith(f"{tmp_path.name} is a folder")
    assert refusal(pipe).startswith("pipe is a folder, a pipe or a device")
    assert refusal(empty).startswith("empty.jpg is empty")
    assert refusal(b"").startswith("The picture is empty")
    for odd in ("x\0y", "x" * 5000, ""):
        refusal(odd)

    def deny(*_):
        raise PermissionError(13, "Permission denied", str(empty))

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(empty).startswith("empty.jpg may not be read")


def test_odd_names_are_shown_plainly(tmp_path):
    path = tmp_path / "a\n<b>\x1b[31m\udcff.png"
    path.write_bytes(b"no picture")
    refusal(path)
    refusal(path).encode()


# Folders


def test_list_pictures(tmp_path):
    names = ["b.JPG", "a.heic", "c.webp", "d.avif", "e.tiff", "notes.txt", ".hidden.png", "jpg"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.name for path in list_pictures(tmp_path)]
    assert found == ["a.heic", "b.JPG", "c.webp", "d.avif", "e.tiff"]
    assert list_pictures(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]


def test_list_pictures_refuses(tmp_path):
    for path, words in [(tmp_path, "no picture files"), (tmp_path / "gone", "does not exist")]:
        with pytest.raises(UserError, match=words) as caught:
            list_pictures(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="name of a picture is empty"):
        list_pictures("")  # a variable that is not set, not this folder


class CollectingLock:
    """A lock within which the garbage collector runs each time, as it may at any allocation."""

    def __init__(self, lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()
        gc.collect()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_picture_collected_while_pixels_are_counted(monkeypatch):
    """The collector runs a picture's finaliser in the thread that holds the counter's lock."""
    gc.collect()
    before = held.pixels
    held.take(1200)
    circle = [hold(Image.new("RGB", (30, 40)), "key")]
    circle.append(circle)  # only the collector frees it
    del circle
    monkeypatch.setattr(held, "_lock", CollectingLock(held._lock))
    thread = threading.Thread(target=held.take, args=(10,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "take and the finaliser wait for each other"
    assert held.pixels == before + 10
    held.give_back(10)
    assert held.pixels == before
