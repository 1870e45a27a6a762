"""COCO's ``instances.json``, read as a stream: only what a split needs is kept, masks as RLE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.evaluation.datasets.record import Rle, need_extra
from sam4mllm_tool.types import Box


@dataclass(frozen=True)
class CocoImage:
    """A picture's file name and its size in pixels."""

    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoObject:
    """An annotated object."""

    mask: Rle
    box: Box


def read_images(path: Path, wanted: AbstractSet[int]) -> dict[int, CocoImage]:
    """The wanted images by id."""
    return {
        item["id"]: CocoImage(item["file_name"], item["width"], item["height"])
        for item in _items(path, "images.item")
        if item["id"] in wanted
    }


def read_objects(
    path: Path, wanted: AbstractSet[int], images: dict[int, CocoImage]
) -> dict[int, CocoObject]:
    """The wanted annotations by id; their images must be among ``images``."""
    found = {}
    for item in _items(path, "annotations.item"):
        if item["id"] in wanted:
            image = images[item["image_id"]]
            x, y, width, height = map(float, item["bbox"])
            mask = to_rle(item["segmentation"], image.width, image.height)
            found[item["id"]] = CocoObject(mask, Box(x, y, x + width, y + height))
    return found


def to_rle(segmentation: Any, width: int, height: int) -> Rle:
    """Polygons, uncompressed or compressed RLE → compressed RLE with text counts.

    Polygons are rasterised by pycocotools, as the makers' own code does.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return {"size": list(segmentation["size"]), "counts": counts}
        return as_text(coco_mask.frPyObjects(segmentation, height, width))
    # Fewer than three corners make no area, and pycocotools would take four numbers for a box.
    polygons = [list(map(float, polygon)) for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return empty_rle(width, height)
    return as_text(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def empty_rle(width: int, height: int) -> Rle:
    """A mask without a pixel."""
    return as_text(coco_mask.encode(np.zeros((height, width), dtype=np.uint8, order="F")))


def as_text(rle: dict[str, Any]) -> Rle:
    """pycocotools' RLE with its counts as text, JSON-ready."""
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def merge(rles: Sequence[Rle]) -> Rle:
    """The union of masks of one size."""
    return as_text(coco_mask.merge([{**r, "counts": r["counts"].encode()} for r in rles]))


def _items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    ijson = need_extra("ijson")
    try:
        with path.open("rb") as file:
            yield from ijson.items(file, prefix, use_float=True)
    except ijson.JSONError as error:
        raise DatasetError(
            f"{path} is not valid JSON: {error}", hint="Download the file again."
        ) from error
