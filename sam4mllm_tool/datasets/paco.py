"""PACO-LVIS: parts of objects in COCO's pictures ("neck of bottle").

Layout (Ramanathan et al., CVPR 2023, ``docs/PACO_DATASET.md`` of its repository)::

    annotations/paco_lvis_v1_SPLIT.json      (or beside the pictures)
    train2017/*.jpg  val2017/*.jpg

Category names of parts are ``object:part``. An annotation whose ``obj_ann_id`` is its own id is the
object itself; as in the authors' notebook only parts are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.coco import stream_items
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample

_SOURCE = "paco_lvis_v1.zip (linked from https://github.com/facebookresearch/paco)"
_COCO = "http://images.cocodataset.org/zips/train2017.zip and val2017.zip"


def examples(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """The parts of the split's pictures by name, one record each.

    Raises:
        DatasetError: a missing or malformed file.
    """
    name = f"paco_lvis_v1_{split}.json"
    file = named.present("paco", (data / "annotations" / name, data / name), _SOURCE)
    names = {
        item["id"]: _spoken(item["name"])
        for part in ("categories.item", "part_categories.item")
        for item in stream_items(file, part)
        if ":" in item["name"]
    }
    folders = (data, data / "images", data / "coco", data / "coco/images")
    pictures = named.coco_pictures(file, names, named.Folder(folders, _COCO))
    return named.examples("paco", split, pictures)


def _spoken(category: str) -> str:
    whole, _, part = category.partition(":")
    return f"{part} of {whole}"
