"""Masks of one picture as files: PNG, COCO JSON, LabelMe, an overlay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from sam4mllm_tool.drawing.overlay import overlay_masks
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.folders import write_file
from sam4mllm_tool.masks.coco import CocoPicture, coco_annotation, coco_document
from sam4mllm_tool.masks.interop import LabelledMask
from sam4mllm_tool.types import RgbImage

FileFormat = Literal["png", "coco_rle", "coco_polygons", "overlay"]
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)


def masks_to_coco(
    masks: Sequence[LabelledMask], image: RgbImage, file_name: str, *, polygons: bool = False
) -> dict[str, Any]:
    """A COCO document of one picture: one category per name, one annotation per mask."""
    annotations = [
        (one.name, coco_annotation(one.mask, polygons=polygons, object_id=one.object_id))
        for one in masks
    ]
    return coco_document([CocoPicture(file_name, image.width, image.height, annotations)])


def save_masks(
    masks: Sequence[LabelledMask],
    image: RgbImage,
    folder: str | Path,
    formats: Sequence[FileFormat],
    policy: ImagePolicy,
    *,
    stem: str,
    file_name: str,
    overlay: Image.Image | None = None,
) -> list[Path]:
    """Write masks to a folder; returns the paths.

    Nothing is overwritten: a name that exists gets a number.

    Args:
        masks: of one image; ``object_id`` is part of the names of the PNG files.
        image: the picture they belong to.
        folder: created if it does not exist.
        formats: any of ``FILE_FORMATS``.
        policy: decides which folders may be written to.
        stem: prefix of the file names.
        file_name: the picture's ``file_name`` in the COCO document.
        overlay: written instead of the default overlay.

    Raises:
        AccessDenied: the folder may not be written to.
        StorageError: the disk is full.
    """
    written: list[Path] = []

    def write(name: str, data: bytes) -> None:
        written.append(write_file(folder, f"{stem}_{name}", data, policy))

    if "png" in formats:
        for one in masks:
            write(f"{one.object_id}.png", _png(one.mask.to_pil()))
    for kind in ("coco_rle", "coco_polygons"):
        if kind in formats:
            document = masks_to_coco(masks, image, file_name, polygons=kind == "coco_polygons")
            write(f"{kind}.json", json.dumps(document, indent=1).encode())
    if "overlay" in formats:
        numbered = {n: one.mask for n, one in enumerate(masks, 1)}
        write("overlay.png", _png(overlay or overlay_masks(image, numbered)))
    return written


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
