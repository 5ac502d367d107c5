"""Images in: where they come from, how bytes become RGB, how RGB becomes square batches.

First stage of the flow (images -> annotate): `sources` -> `decode` -> `crop` -> `stream`.
`sources` opens a data set through the file of its layout: `folder`, `lsun`, `imagenet`, `tar`, `huggingface`,
`arrays`, `scenes`, `remote`.
"""

from __future__ import annotations

from ldm_sg.data.crop import center_crop_resize
from ldm_sg.data.decode import BadImage, decode_rgb
from ldm_sg.data.elpv import elpv_source
from ldm_sg.data.folder import IMAGE_SUFFIXES, FolderSource
from ldm_sg.data.scenes import Annotation, SceneSource
from ldm_sg.data.sources import DATASETS, ImageSource, open_source
from ldm_sg.data.stream import ImageBatch, batches, load_images, to_model_range, to_uint8

__all__ = [
    "DATASETS",
    "IMAGE_SUFFIXES",
    "Annotation",
    "BadImage",
    "FolderSource",
    "ImageBatch",
    "ImageSource",
    "SceneSource",
    "batches",
    "center_crop_resize",
    "decode_rgb",
    "elpv_source",
    "load_images",
    "open_source",
    "to_model_range",
    "to_uint8",
]
