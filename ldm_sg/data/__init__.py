"""Images in: where they come from, how bytes become RGB, how RGB becomes square batches.

First stage of the flow (images -> annotate): `sources` -> `decode` -> `crop` -> `stream`.
"""

from __future__ import annotations

from ldm_sg.data.crop import center_crop_resize
from ldm_sg.data.decode import BadImage, decode_rgb
from ldm_sg.data.sources import (
    DATASETS,
    IMAGE_SUFFIXES,
    FolderSource,
    ImageSource,
    elpv_source,
    open_source,
)
from ldm_sg.data.stream import ImageBatch, batches, load_images, to_model_range, to_uint8

__all__ = [
    "DATASETS",
    "IMAGE_SUFFIXES",
    "BadImage",
    "FolderSource",
    "ImageBatch",
    "ImageSource",
    "batches",
    "center_crop_resize",
    "decode_rgb",
    "elpv_source",
    "load_images",
    "open_source",
    "to_model_range",
    "to_uint8",
]
