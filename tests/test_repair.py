"""Pictures that viewers show although their files are not whole, or too large, or too dark."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minigpt4.model import image_file
from minigpt4.model.image import load
from tests.test_image import RED, assert_colour, encoded, noise, pixels, png, quarters, refusal

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("missing", [1, 2, 3, 4, 8])
def test_a_jpeg_without_its_last_bytes(options, missing):
    data = encoded(noise(320, 240), "JPEG", **options)
    whole, cut = pixels(load(data)).astype(int), pixels(load(data[:-missing])).astype(int)
    assert (np.abs(whole - cut).max(2) > 40).mean() < image_file.MOST_MISSING


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_jpeg_of_which_much_is_missing_is_refused(options, share):
    data = encoded(noise(320, 240), "JPEG", **options)
    assert "damaged" in refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
        ("GIF", {"transparency": 0}),
        ("TIFF", {"compression": "raw", "strip_size": 4000}),
    ],
)
def test_other_files_without_their_last_bytes(format, options):
    image = noise(320, 240).convert("P" if format == "GIF" else "RGB")
    data = encoded(image, format, **options)
    whole = pixels(load(data)).astype(int)
    for missing in (10, 100):
        cut = pixels(load(data[:-missing])).astype(int)
        assert (whole != cut).any(2).mean() < image_file.MOST_MISSING
    for share in (0.9, 0.5):
        assert "damaged" in refusal(data[: int(len(data) * share)])


def test_a_dark_end_counts_as_what_it_is_and_interlaced_pictures_by_their_pixels():
    image = noise(320, 240)
    image.paste(0, (0, 120, 320, 240))
    data = encoded(image, "BMP")
    assert (pixels(load(data[:-100])) == pixels(load(data))).all(2).mean() > 0.99
    data = encoded(noise(320, 240).convert("L"), "GIF", interlace=1)
    assert load(data[:-50]).rgb.size == (320, 240)
    assert "damaged" in refusal(data[: len(data) // 2])


def test_a_thumbnail_in_the_exif_does_not_hide_that_scans_are_missing():
    thumbnail = encoded(quarters(), "JPEG")
    exif = b"Exif\0\0" + thumbnail
    data = encoded(noise(320, 240), "JPEG", progressive=True, exif=exif)
    assert "damaged" in refusal(data[: len(data) // 2])
    assert load(data[:-2]).rgb.size == (320, 240)


def test_an_index_of_pictures_that_are_not_there():
    """Phones write it; the first picture is sound."""
    data = encoded(quarters(), "MPO", save_all=True, append_images=[quarters()], quality=95)
    count = b"\x01\xb0\x04\x00\x01\x00\x00\x00"  # the tag, its type and one number of it
    assert count + b"\x02" in data
    assert_colour(load(data.replace(count + b"\x02", count + b"\x07")), RED, 8, at=(8, 8))


def with_chunk(data: bytes, kind: bytes, body: bytes, before: bytes, wrong: bool) -> bytes:
    checksum = zlib.crc32(kind + body) ^ wrong
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    place = data.index(before) - 4
    return data[:place] + chunk + data[place:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "body"), [(b"tEXt", b"a\0b"), (b"gAMA", bytes(4)), (b"zzZz", b"")]
)
def test_wrong_checksums_beside_the_picture(before, kind, body):
    sound = encoded(quarters(), "PNG")
    damaged = with_chunk(sound, kind, body, before, wrong=True)
    assert (pixels(load(damaged)) == pixels(load(sound))).all()


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [(b"iCCP", b"x" * 50), (b"iCCP", b"x\0\1"), (b"zTXt", b"x\0\1"), (b"pHYs", b"1")],
)
def test_unreadable_chunks_beside_the_picture(before, kind, body):
    sound = encoded(quarters(), "PNG")
    damaged = with_chunk(sound, kind, body, before, wrong=False)
    assert (pixels(load(damaged)) == pixels(load(sound))).all()


def test_a_wrong_checksum_of_the_picture_is_refused():
    data = bytearray(encoded(quarters(), "PNG"))
    data[data.index(b"IHDR") + 13] ^= 1
    assert "damaged" in refusal(bytes(data))


@pytest.mark.parametrize(
    ("size", "expected"), [((8064, 6048), (4032, 3024)), ((16_320, 12_240), (4080, 3060))]
)
@pytest.mark.trust("Pictures", "JPEG files of 48 to 200 megapixels, decoded smaller")
def test_a_phones_jpeg_is_decoded_smaller(size, expected):
    picture = Image.new("L", size, 60)
    picture.paste(200, (size[0] // 2, 0, *size))
    data = encoded(picture, "JPEG", exif=b"")
    del picture
    rgb = load(data).rgb
    # 200 megapixels: a half would still have 50.
    assert rgb.size == expected
    assert rgb.getpixel((10, 10))[0] == 60 and rgb.getpixel((expected[0] - 9, 9))[0] == 200


@pytest.mark.parametrize(
    ("options", "size", "limit"),
    [({}, (16_400, 12_300), "200"), ({"progressive": True}, (8200, 8000), "64")],
)
def test_larger_jpegs_are_refused_before_decoding(options, size, limit):
    data = bytearray(encoded(quarters(), "JPEG", **options))
    frame = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", size[1], size[0])
    assert f"more than {limit} megapixels" in refusal(bytes(data))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 4095), (100, 900), (7500, 8500), (64_000, 65_535), (30_000, 30_020)]
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_little_used_ranges_of_sixteen_bits_are_stretched(low, high, format):
    values = np.linspace(low, high, 64 * 48).astype("<u2").reshape(48, 64)
    values[20, 20] = 65_535  # a faulty pixel
    values[21, 21] = 0
    image = Image.frombytes("I;16", (64, 48), values.tobytes())
    found = pixels(load(encoded(image, format)))[..., 0]
    assert found.min() == 0 and found.max() == 255
    assert abs(int(found[24].mean()) - 128) < 12


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (20_000, 26_000)])
@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_twelve_bit_colours_in_sixteen_bits_are_stretched(colour, channels, low, high):
    values = np.linspace(low, high, 48 * 64 * channels).reshape(48, 64, channels)
    values[20, 20], values[21, 21] = 65_535, 0  # faulty pixels
    if channels in (2, 4):
        values[..., -1] = 65_535  # opaque
    rows = (b"\0" + row.tobytes() for row in values.astype(">u2"))
    found = pixels(load(png(64, 48, 16, colour, b"".join(rows))))
    assert found.min() == 0 and found.max() == 255
    assert abs(int(found[24].mean()) - 128) < 20


@pytest.mark.parametrize(
    ("kind", "low", "high", "faulty"),
    [("<f4", 290, 310, -9999), ("<f4", 290, 310, np.inf), ("<i4", 0, 4000, 2**31 - 1)],
)
def test_faulty_pixels_of_wide_grey_do_not_flatten_it(kind, low, high, faulty):
    values = np.linspace(low, high, 64 * 48).astype(kind).reshape(48, 64)
    values[20, 20:22] = faulty
    found = pixels(load(encoded(Image.fromarray(values), "TIFF")))[..., 0]
    assert abs(int(found[24].mean()) - 128) < 12


@pytest.mark.parametrize("value", [0, 30_000, 65_535])
def test_flat_sixteen_bits_keep_their_brightness(value):
    image = Image.frombytes("I;16", (8, 8), np.full((8, 8), value, "<u2").tobytes())
    found = pixels(load(encoded(image, "PNG")))
    assert found.min() == found.max() == round(value / 257)
