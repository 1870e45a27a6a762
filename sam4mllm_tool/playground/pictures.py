"""Pictures for the page: scaled for display only; coordinates are pixels of the original."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from sam4mllm_tool.drawing.overlay import colour_of, mask_layer, overlay_masks
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.tools.records import ImageRecord, ObjectRecord, labelled_masks
from sam4mllm_tool.types import Mask, RgbImage

MAX_SIDE = 2048
"""Longest side in pixels at which a picture and its masks are shown."""
THUMBNAIL_SIDE = 160

File = tuple[bytes, str]
"""Content and media type."""


def shown_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a picture is shown: its own, unless a side is longer than ``MAX_SIDE``."""
    scale = min(1.0, MAX_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def picture_file(image: RgbImage) -> File:
    """The picture for display: a small one as lossless PNG, a large one as JPEG."""
    size = shown_size(*image.size)
    if size == image.size and image.width * image.height <= 1024**2:
        return _png(image.pil)
    return _jpeg(image.pil if size == image.size else image.pil.resize(size))


def thumbnail_file(image: RgbImage) -> File:
    """A small picture for the gallery."""
    small = image.pil.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return _jpeg(small)


def mask_file(mask: Mask, number: int) -> File:
    """The mask for display, in the colour of an object's number, transparent outside the object."""
    size = shown_size(mask.width, mask.height)
    if size != (mask.width, mask.height):
        mask = Mask(np.asarray(mask.to_pil().resize(size)) > 127)
    return _png(mask_layer(mask, colour_of(number)))


def mask_download(record: ObjectRecord) -> File:
    """The mask at the picture's size: 255 on the object, 0 elsewhere."""
    assert record.mask is not None
    return _png(record.mask.to_pil())


def overlay_download(image: ImageRecord, masks: Mapping[int, Mask]) -> File:
    """The picture at its full size with numbered masks."""
    return _png(overlay_masks(image.image, masks))


def coco_download(image: ImageRecord, records: Sequence[ObjectRecord]) -> File:
    """All masks as a COCO document with RLE."""
    document: dict[str, Any] = masks_to_coco(labelled_masks(records), image.image, image.file_name)
    return json.dumps(document, indent=1).encode(), "application/json"


def trace_download(trace: Trace, image: ImageRecord, suffix: str) -> File:
    """The trace of the call that found an object: ``"json"``, or ``"html"`` with the picture."""
    with TemporaryDirectory() as folder:
        path = trace.save(Path(folder) / f"trace.{suffix}", image.image)
        return path.read_bytes(), "application/json" if suffix == "json" else "text/html"


def full_download(image: ImageRecord) -> File:
    """The picture as the models see it: upright RGB, at its full size."""
    return _png(image.image.pil)


def _png(picture: Image.Image) -> File:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue(), "image/png"


def _jpeg(picture: Image.Image) -> File:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue(), "image/jpeg"
