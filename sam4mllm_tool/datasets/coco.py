"""COCO's ``instances.json``, read as a stream: only what a split needs is kept, masks as RLE."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam4mllm_tool.datasets.record import Rle, need_extra
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.masks.coco import segmentation_to_rle
from sam4mllm_tool.types import Box, Mask


@dataclass(frozen=True)
class CocoImage:
    """A picture's file name and its size in pixels."""

    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoObject:
    """An annotated object, or a crowd of them under one mask.

    Attributes:
        scored: its mask stretched to the size asked for.
    """

    image_id: int
    mask: Rle
    box: Box
    crowd: bool = False
    scored: Rle | None = None


def read_images(path: Path, wanted: AbstractSet[int] | None = None) -> dict[int, CocoImage]:
    """The wanted images (all, without any) by id."""
    return {
        item["id"]: CocoImage(item["file_name"], item["width"], item["height"])
        for item in stream_items(path, "images.item")
        if wanted is None or item["id"] in wanted
    }


def read_objects(
    path: Path, images: dict[int, CocoImage], scored_size: tuple[int, int] | None = None
) -> dict[int, CocoObject]:
    """All annotations on ``images``, by id.

    Args:
        scored_size: (width, height) to also give the masks at.
    """
    found = {}
    for item in stream_items(path, "annotations.item"):
        if (image := images.get(item["image_id"])) is not None:
            x, y, width, height = map(float, item["bbox"])
            mask = segmentation_to_rle(item["segmentation"], image.width, image.height)
            box = Box(x, y, x + width, y + height)
            crowd = bool(item.get("iscrowd"))
            scored = None
            if scored_size is not None:
                scored = _stretched(item["segmentation"], mask, image, scored_size)
            found[item["id"]] = CocoObject(item["image_id"], mask, box, crowd, scored)
    return found


def _stretched(segmentation: Any, mask: Rle, image: CocoImage, size: tuple[int, int]) -> Rle:
    """The mask at another size: polygons before they are rasterised, RLE by nearest pixel.

    This is what detectron2's ``Resize`` makes of annotations, which ReLA evaluates with.
    """
    width, height = size
    if isinstance(segmentation, dict):
        return Mask.from_rle(mask).resized(size).to_rle()
    across, down = width / image.width, height / image.height
    polygons = [
        [number * (down if place % 2 else across) for place, number in enumerate(polygon)]
        for polygon in segmentation
    ]
    return segmentation_to_rle(polygons, width, height)


def stream_items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """The objects under ``prefix`` of a JSON file, one at a time.

    Raises:
        DatasetError: it is not valid JSON.
    """
    ijson = need_extra("ijson")
    try:
        with path.open("rb") as file:
            yield from ijson.items(file, prefix, use_float=True)
    except ijson.JSONError as error:
        raise DatasetError(
            f"{path} is not valid JSON: {error}", hint="Download the file again."
        ) from error
