"""Decoding: real files of every troublesome kind, made here, are used rightly or refused with a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data import decode
from ldm_sg.data.decode import BadImage, decode_rgb

RAMP = np.linspace(0, 255, 32 * 24).reshape(24, 32).astype(np.uint8)  # (H, W)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)  # (H, W, 3)
LEVELS_16 = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return np.array(image)


def reason_of(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode_rgb(data)
    reason = str(caught.value)
    assert 0 < len(reason) <= decode.REASON_CHARS and "\n" not in reason and "object at" not in reason
    return reason


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, bits: int = 8, colour: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)


def grey_png(levels: np.ndarray, *extra: bytes) -> bytes:
    """16-bit grey PNG written by hand, so that the file is the same under every Pillow."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = png_header(levels.shape[1], levels.shape[0], bits=16)
    return head + b"".join(extra) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def grey_tiff(levels: np.ndarray, order: str = "<", sample_format: int = 1) -> bytes:
    """Uncompressed one-strip grey TIFF of any sample type and byte order."""
    body = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    height, width = levels.shape
    tags = {256: width, 257: height, 258: levels.itemsize * 8, 259: 1, 262: 1}
    tags |= {273: 8, 277: 1, 278: height, 279: len(body), 339: sample_format}
    entries = b"".join(
        struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value) for tag, value in tags.items()
    )
    magic = {"<": b"II", ">": b"MM"}[order]
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return magic + struct.pack(order + "HI", 42, 8 + len(body)) + body + directory


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[decode.ORIENTATION_TAG] = orientation
    return exif.tobytes()


def test_plain_rgb_and_grey():
    np.testing.assert_array_equal(pixels_of(encode(Image.fromarray(COLOUR))), COLOUR)
    grey = pixels_of(encode(Image.fromarray(RAMP)))
    np.testing.assert_array_equal(grey, np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_every_format_opens(file_format):
    result = pixels_of(encode(Image.fromarray(COLOUR), file_format))
    assert np.abs(result.astype(int) - COLOUR).mean() < 12


def test_one_bit_image():
    image = Image.fromarray(RAMP).convert("1")
    np.testing.assert_array_equal(pixels_of(encode(image)), np.array(image.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.new("CMYK", (24, 24), (0, 255, 255, 0))
    result = pixels_of(encode(cmyk, "JPEG", quality=95))
    assert (np.abs(result.astype(int) - [255, 0, 0]) < 10).all()


@pytest.mark.parametrize(
    "data",
    [grey_png(LEVELS_16), grey_tiff(LEVELS_16, "<"), grey_tiff(LEVELS_16, ">")],
    ids=["png", "tiff-little", "tiff-big"],
)
def test_16_bit_grey_is_divided_by_257(data):
    expected = np.rint(LEVELS_16 / 257).astype(np.uint8)
    result = pixels_of(data)
    np.testing.assert_array_equal(result, np.repeat(expected[..., None], 3, axis=2))
    assert result.min() == 0 and result.max() == 255


def test_16_bit_pgm_is_divided_by_257():
    data = b"P5 32 24 65535\n" + LEVELS_16.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels_of(data)[..., 0], np.rint(LEVELS_16 / 257))


def test_dark_16_bit_grey_stays_dark():
    assert pixels_of(grey_png(LEVELS_16 // 256)).max() == 1


def test_16_bit_grey_with_a_transparent_level_is_white_there():
    levels = np.full((16, 16), 1000, np.uint16)
    levels[:8] = 0
    result = pixels_of(grey_png(levels, png_chunk(b"tRNS", struct.pack(">H", 0))))
    assert (result[:8] == 255).all() and (result[8:] == 4).all()


def test_integers_beyond_16_bits_are_refused():
    wide = np.linspace(0, 1e6, 32 * 24).reshape(24, 32).astype(np.int32)
    assert "grey values 0 to 1000000, 0 to 65535 expected" in reason_of(grey_tiff(wide, sample_format=2))
    assert "grey values -5" in reason_of(grey_tiff((LEVELS_16 // 2 - 5).astype(np.int16), sample_format=2))


@pytest.mark.parametrize("peak", [1, 255, 65535])
def test_float_tiff_is_scaled_by_its_range(peak):
    levels = (LEVELS_16 / 65535 * peak).astype(np.float32)
    result = pixels_of(grey_tiff(levels, sample_format=3))
    np.testing.assert_allclose(result[..., 0], LEVELS_16 / 257, atol=0.51)


@pytest.mark.parametrize("value", [-1.0, 1e6, np.nan, np.inf])
def test_float_out_of_range_is_refused(value):
    levels = np.full((16, 16), 0.5, np.float32)
    levels[3, 4] = value
    assert reason_of(grey_tiff(levels, sample_format=3)).startswith("float values")


def test_alpha_is_composited_over_white():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:8, :, 0] = 200
    rgba[:8, :, 3] = 255
    rgba[8:12, :, 3] = 128
    result = pixels_of(encode(Image.fromarray(rgba)))
    assert (result[:8] == [200, 0, 0]).all()
    assert (np.abs(result[8:12].astype(int) - 127) <= 1).all()
    assert (result[12:] == 255).all()


def test_grey_with_alpha():
    pixels = np.zeros((16, 16, 2), np.uint8)
    pixels[:8, :, 1] = 255
    result = pixels_of(encode(Image.fromarray(pixels).convert("LA")))
    assert (result[:8] == 0).all() and (result[8:] == 255).all()


@pytest.mark.parametrize("file_format, transparency", [("PNG", 1), ("PNG", b"\xff\x00"), ("GIF", 1)])
def test_palette_with_transparency(file_format, transparency):
    index = np.zeros((16, 16), np.uint8)
    index[:8] = 1
    image = Image.fromarray(index)
    image.putpalette([10, 200, 30, 0, 0, 0])
    result = pixels_of(encode(image, file_format, transparency=transparency))
    assert (result[:8] == 255).all() and (result[8:] == [10, 200, 30]).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format, orientation):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL.Image.Transpose values
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    stored = Image.fromarray(upright)
    stored = stored if undo is None else stored.transpose(Image.Transpose(undo))
    options = {"lossless": True} if file_format == "WEBP" else {}
    result = pixels_of(encode(stored, file_format, exif=exif_with(orientation), **options))
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() < 10


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert (pixels_of(data) == [255, 0, 0]).all(), file_format


def test_empty_file():
    assert reason_of(b"") == "empty file"


@pytest.mark.parametrize("data", [b"this is no image\n" * 40, b"P5 but not really", b"%!PS-Adobe-3.0 EPSF\n", b"\0"])
def test_text_with_an_image_name(data):
    assert reason_of(data)


def test_text_has_a_stable_reason():
    assert reason_of(b"hello") == "not an image: content is none of PNG JPEG WEBP BMP TIFF GIF PPM"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(file_format, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    assert reason_of(data[: int(len(data) * share)])


def test_truncated_jpeg_reason():
    data = encode(Image.fromarray(COLOUR), "JPEG")
    assert "truncated" in reason_of(data[: len(data) // 2 + 300])


def test_random_damage_never_escapes():
    rng = np.random.default_rng(0)
    for file_format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        data = np.frombuffer(encode(Image.fromarray(COLOUR), file_format), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            where = rng.integers(0, min(len(data), 400), 6)
            damaged[where] = rng.integers(0, 256, 6)
            try:
                assert decode_rgb(damaged.tobytes()).mode == "RGB"
            except BadImage:
                continue


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small(size):
    assert reason_of(encode(Image.new("RGB", size))) == f"too small: {size[0]}x{size[1]} px, at least 8x8 expected"


def test_smallest_accepted():
    assert decode_rgb(encode(Image.new("RGB", (8, 8)))).size == (8, 8)


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_decompression_bomb_is_refused_before_decoding(side):
    data = png_header(side, side) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    assert reason_of(data).startswith("too large")


def test_compressed_text_bomb_is_no_crash():
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9))
    data = encode(Image.fromarray(RAMP))
    assert reason_of(data[:33] + bomb + data[33:])


def test_damaged_exif_does_not_cost_the_image():
    data = encode(Image.fromarray(COLOUR), "JPEG", exif=exif_with(6))
    body = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 9) + b"\x12\x01\x02\0\xff\xff\xff\xff"
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    start = data.index(b"\xff\xe1")
    end = start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0]
    assert decode_rgb(data[:start] + segment + data[end:]).size == (32, 24)


DAMAGED_APNG = png_header(16, 16) + png_chunk(b"acTL", bytes(8))
DAMAGED_APNG += png_chunk(b"IDAT", zlib.compress(bytes(17 * 16))) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("action", ["error", "default", "always"])
def test_result_does_not_depend_on_warning_filters(action):
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.simplefilter(action)
        assert decode_rgb(DAMAGED_APNG).size == (16, 16)
    assert seen == []


def test_the_filter_is_added_once_and_only_for_pillow():
    with warnings.catch_warnings():
        decode_rgb(DAMAGED_APNG)
        once = list(warnings.filters)
        decode_rgb(DAMAGED_APNG)
        assert list(warnings.filters) == once
        with pytest.warns(UserWarning, match="ours"):
            warnings.warn("ours", stacklevel=1)
