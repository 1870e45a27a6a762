"""Your own pictures: a folder with COCO JSON, LabelMe files, or a file of JSON lines.

Each may hold one split (``train``) at its top, or a folder or file for each split::

    coco        annotations.json (or annotations_SPLIT.json), pictures beside it or in images/;
                expressions: "expressions" of an annotation, else its category's name, which then
                means all objects of the picture that have it
    labelme     NAME.json beside NAME.jpg (or in SPLIT/); a shape's label is the expression; shapes
                with the same label are targets of one expression, those with the same group_id are
                one object
    jsonl       data.jsonl (or SPLIT.jsonl); a line: {"image": "a.jpg", "text": "the dog" (or a
                list), "masks": [PNG file, COCO RLE or polygons, …]}; no masks: no target
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.coco import read_images, stream_items
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample, Rle, mask_of
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.masks.coco import merge_rles, segmentation_to_rle
from sam4mllm_tool.types import Mask, TargetCount

_FORMAT = "a file as described in the docs"


def coco(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """A folder with a COCO document; every object counts, however small.

    Raises:
        DatasetError: a missing or malformed file.
    """
    file = named.present("coco", _of_split(data, split, "annotations{}.json"), _FORMAT)
    folder_of = named.Folder((file.parent, file.parent / "images", file.parent / split), "them")
    images = read_images(file)
    annotated: dict[int, list[ReferringExample]] = {}
    for item in stream_items(file, "annotations.item"):
        texts, image = item.get("expressions"), images.get(item["image_id"])
        if texts and image is not None:
            mask = segmentation_to_rle(item["segmentation"], image.width, image.height)
            record = _record("coco", split, str(item["image_id"]), folder_of(image), texts, [mask],
                             number=str(item["id"]))  # fmt: skip
            annotated.setdefault(item["image_id"], []).append(record)
    if annotated:
        yield from (record for found in annotated.values() for record in found)
        return
    names = {item["id"]: item["name"] for item in stream_items(file, "categories.item")}
    pictures = named.coco_pictures(file, names, folder_of, smallest=-1.0)
    yield from named.examples("coco", split, pictures, most=10**6, smallest=-1.0)


def labelme(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """A folder of LabelMe's files; polygons, rectangles and circles.

    Raises:
        DatasetError: there are no files.
    """
    folder = data / split if (data / split).is_dir() else data
    files = sorted(folder.glob("*.json")) if split == "train" or folder != data else []
    if not files:
        raise DatasetError(
            f"labelme: no .json files in {folder}",
            hint="Give LabelMe's folder, NAME.json beside NAME.jpg.",
        )
    for file in files:
        try:
            yield from _labelme_picture(file, split)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = DatasetError(f"LabelMe: {file} cannot be read: {error!r}")
            yield ReferringExample.unreadable("labelme", split, file.stem, fault)


def _labelme_picture(file: Path, split: str) -> list[ReferringExample]:
    notes = json.loads(file.read_text(encoding="utf-8"))
    size = int(notes["imageWidth"]), int(notes["imageHeight"])
    groups: dict[str, dict[Any, list[Rle]]] = {}
    for number, shape in enumerate(notes["shapes"]):
        group = shape.get("group_id")
        key = ("alone", number) if group is None else ("group", group)
        rle = segmentation_to_rle([_outline(shape)], *size)
        groups.setdefault(shape["label"].strip(), {}).setdefault(key, []).append(rle)
    image = file.parent / Path(str(notes["imagePath"]).replace("\\", "/")).name
    return [
        _record("labelme", split, file.stem, image, label, [merge_rles(r) for r in found.values()],
                number=label)
        for label, found in groups.items()
    ]  # fmt: skip


def _outline(shape: dict[str, Any]) -> list[float]:
    """A shape's corners as x, y, x, y, …"""
    points, kind = shape["points"], shape.get("shape_type", "polygon")
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle":  # its centre and a point on it
        (x, y), edge = points
        radius = float(np.hypot(edge[0] - x, edge[1] - y))
        turns = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = [(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns]
    elif kind != "polygon":
        raise ValueError(f"shapes of the kind {kind!r} have no area")
    return [float(number) for point in points for number in point]


def jsonl(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """A file of JSON lines; paths are relative to it.

    Raises:
        DatasetError: a missing file, or a line that is no such object.
    """
    file = data
    if not data.is_file():
        file = named.present("jsonl", (*_of_split(data, split, "data{}.jsonl"),
                                       data / f"{split}.jsonl"), _FORMAT)  # fmt: skip
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image = file.parent / row["image"]
                with Image.open(image) as opened:
                    size = opened.size
                masks = [_mask(one, file.parent, size) for one in row.get("masks", [])]
                yield _record("jsonl", split, str(row["image"]), image, row["text"], masks,
                              number=str(number))  # fmt: skip
            except OSError as error:
                fault = DatasetError(f"{file}, line {number}: {error}")
                yield ReferringExample.unreadable("jsonl", split, f"line {number}", fault)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DatasetError(
                    f"{file}, line {number} cannot be read: {error!r}",
                    hint='A line is {"image": "a.jpg", "text": "the dog", "masks": ["a-0.png"]}.',
                ) from error


def _mask(given: Any, folder: Path, size: tuple[int, int]) -> Rle:
    return mask_of(folder / given).to_rle() if isinstance(given, str) else (
        segmentation_to_rle(given, *size)
    )  # fmt: skip


def _record(
    dataset: str,
    split: str,
    image_id: str,
    image: Path,
    texts: str | list[str],
    masks: list[Rle],
    *,
    number: str,
) -> ReferringExample:
    expressions = (texts,) if isinstance(texts, str) else tuple(texts)
    found = [(mask, box) for mask in masks if (box := Mask.from_rle(mask).box) is not None]
    return ReferringExample(
        dataset=dataset,
        split=split,
        example_id=f"{image_id}/{number}",
        image_id=image_id,
        image=image,
        expressions=tuple(str(text).strip() for text in expressions),
        masks=tuple(mask for mask, _ in found),
        boxes=tuple(box for _, box in found),
        count=TargetCount.ZERO_OR_MORE,
    )


def _of_split(data: Path, split: str, name: str) -> list[Path]:
    """Where a split's file may lie; the file without a split's name is the training one."""
    found = [data / name.format(f"_{split}"), data / split / name.format("")]
    return [*found, data / name.format("")] if split == "train" else found


READERS: dict[str, Callable[[Path, str, Protocol], Iterator[ReferringExample]]] = {
    "coco": coco,
    "labelme": labelme,
    "jsonl": jsonl,
}
