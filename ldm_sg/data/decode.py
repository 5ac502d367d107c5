"""Encoded bytes -> 8-bit RGB, or `BadImage` with a short reason for the quarantine list.

Stands between `sources` (bytes) and `crop`. What a file is follows from its content, never from its name.
The same bytes give the same pixels or the same refusal in every thread and under every warning filter.
"""

from __future__ import annotations

import io
import re
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

MIN_SIDE_PX = 8
MAX_PIXELS = 89_478_485  # a quarter GiB of RGB; where Pillow begins to suspect a decompression bomb
# a closed list: EPS would start Ghostscript, others match plain text
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
REASON_CHARS = 120

_PILLOW_MODULES = r"PIL\."
_filter_lock = threading.Lock()


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason that the quarantine records."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode one image to upright 8-bit RGB.

    Orientation from EXIF is applied; CMYK and YCCK become RGB; transparency is composited over white; 16-bit
    grey is divided by 257, never clipped; float grey is scaled by the first of 1, 255, 65535 that it does not
    exceed; of an animation the first frame counts. Colour profiles are ignored. Pillow's warnings are
    switched off process-wide: filters are global to all threads, and what they warn about is judged here.

    Args:
        data: a whole file in one of `FORMATS`.
    Returns:
        Image of mode RGB, both sides at least `MIN_SIDE_PX`.
    Raises:
        BadImage: empty, no image, truncated or damaged, smaller than `MIN_SIDE_PX`, larger than `MAX_PIXELS`,
            or grey values outside every known range.
    Source: ours.
    """
    if not data:
        raise BadImage("empty file")
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image: content is none of " + " ".join(FORMATS)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's readers raise nearly every type on damaged data
        raise BadImage(_reason(error)) from error


def _silence_pillow() -> None:
    # NOTE: catch_warnings would restore other threads' filters at the wrong time; one lasting filter cannot.
    entry = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)
    if entry in warnings.filters:
        return
    with _filter_lock:
        if entry not in warnings.filters:
            warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise BadImage(f"too small: {width}x{height} px, at least {MIN_SIDE_PX}x{MIN_SIDE_PX} expected")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width}x{height} px, at most {MAX_PIXELS} pixels expected")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return _from_levels(_float_levels(np.asarray(image)))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_levels(_integer_levels(np.asarray(image), image.info.get("transparency")))
    if _has_transparency(image):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode[-1] in "Aa" or "transparency" in image.info


def _integer_levels(values: np.ndarray, transparent: object) -> np.ndarray:
    # Pillow 10 opens 16-bit PNG as "I", newer ones as "I;16": both hold 0..65535
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImage(f"grey values {low} to {high}, 0 to 65535 expected: convert to 8 or 16 bits")
    levels = (values.astype(np.uint32) + 128) // 257
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return levels


def _float_levels(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 65535:
        raise BadImage(f"float values {low:g} to {high:g}, 0 to 65535 expected: convert to 8 or 16 bits")
    peak = next(peak for peak in (1, 255, 65535) if high <= peak)
    return np.rint(values * (255 / peak))


def _from_levels(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turned it on load, and up to 10.0 leaves the tag
        return 1
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"cannot decode: {text}"[:REASON_CHARS]
