"""COCO JSON: the only place that writes and reads its annotations and run-length encodings.

Pixels, ``bbox`` as [x, y, width, height], masks as compressed RLE with text counts or as polygons
(the format of https://cocodataset.org/#format-data). Rasterising is left to pycocotools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam4mllm_tool.masks.polygons import mask_to_polygons
from sam4mllm_tool.types import Mask

Rle = dict[str, Any]
"""``{"size": [height, width], "counts": str}``."""


@dataclass(frozen=True)
class CocoPicture:
    """One picture of a document.

    Attributes:
        annotations: (category, annotation of :func:`coco_annotation`) of each object.
        image_id: ``None`` numbers the pictures from 1.
    """

    file_name: str
    width: int
    height: int
    annotations: Sequence[tuple[str, dict[str, Any]]]
    image_id: int | None = None


def coco_annotation(mask: Mask, *, polygons: bool = False, **extra: Any) -> dict[str, Any]:
    """The annotation of one mask, without the ids that a document gives it.

    Both forms are exact; see :mod:`sam4mllm_tool.masks.polygons` for masks with holes.

    Args:
        mask: may be empty; its ``bbox`` is then all zeros.
        polygons: write polygons instead of RLE.
        extra: further keys (``object_id``, ``score``, …; your own ``id``).
    """
    box = mask.box
    return {
        "segmentation": mask_to_polygons(mask) if polygons else mask.to_rle(),
        "area": mask.area,
        "bbox": [box.x_min, box.y_min, box.width, box.height] if box else [0.0, 0.0, 0.0, 0.0],
        "iscrowd": 0,
        **extra,
    }


def coco_document(
    pictures: Iterable[CocoPicture], categories: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A COCO document.

    Args:
        pictures: with their annotations, which are numbered from 1 unless they have an ``id``.
        categories: name → id; by default numbered from 1 in the order of their first use.
    """
    numbers = dict(categories or {})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, picture in enumerate(pictures, 1):
        image_id = place if picture.image_id is None else picture.image_id
        images.append(
            {
                "id": image_id,
                "file_name": picture.file_name,
                "width": picture.width,
                "height": picture.height,
            }
        )
        for name, annotation in picture.annotations:
            category_id = numbers.setdefault(name, len(numbers) + 1)
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
            annotations.append({**ids, **annotation})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def segmentation_to_rle(segmentation: Any, width: int, height: int) -> Rle:
    """A ``segmentation`` (polygons, uncompressed or compressed RLE) as compressed RLE.

    Polygons are rasterised by pycocotools, as in COCO's own code.
    """
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return rle_with_text(coco_mask.frPyObjects(segmentation, height, width))
        return rle_with_text(segmentation)
    # Fewer than three corners have no area, and pycocotools would read four numbers as a box.
    polygons = [list(map(float, polygon)) for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return empty_rle(width, height)
    return rle_with_text(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def empty_rle(width: int, height: int) -> Rle:
    """A mask without a pixel."""
    return rle_with_text(coco_mask.encode(np.zeros((height, width), dtype=np.uint8, order="F")))


def merge_rles(rles: Sequence[Rle]) -> Rle:
    """The union of masks of one size."""
    return rle_with_text(coco_mask.merge([{**r, "counts": r["counts"].encode()} for r in rles]))


def rle_with_text(rle: Mapping[str, Any]) -> Rle:
    """pycocotools' RLE with its counts as text, JSON-ready."""
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}
