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
from sam4mllm_tool.types import Box


@dataclass(frozen=True)
class CocoImage:
    """A picture's file name and its size in pixels."""

    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoObject:
    """An annotated object, or a crowd of them under one mask."""

    image_id: int
    mask: Rle
    box: Box
    crowd: bool = False


def read_images(path: Path, wanted: AbstractSet[int]) -> dict[int, CocoImage]:
    """The wanted images by id."""
    return {
        item["id"]: CocoImage(item["file_name"], item["width"], item["height"])
        for item in _items(path, "images.item")
        if item["id"] in wanted
    }


def read_objects(path: Path, images: dict[int, CocoImage]) -> dict[int, CocoObject]:
    """All annotations on ``images``, by id."""
    found = {}
    for item in _items(path, "annotations.item"):
        if (image := images.get(item["image_id"])) is not None:
            x, y, width, height = map(float, item["bbox"])
            mask = segmentation_to_rle(item["segmentation"], image.width, image.height)
            box = Box(x, y, x + width, y + height)
            crowd = bool(item.get("iscrowd"))
            found[item["id"]] = CocoObject(item["image_id"], mask, box, crowd)
    return found


def _items(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    ijson = need_extra("ijson")
    try:
        with path.open("rb") as file:
            yield from ijson.items(file, prefix, use_float=True)
    except ijson.JSONError as error:
        raise DatasetError(
            f"{path} is not valid JSON: {error}", hint="Download the file again."
        ) from error
