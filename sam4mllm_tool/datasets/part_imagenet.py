"""Part-ImageNet: parts of animals and things ("Quadruped Head") in ImageNet's pictures.

Layout (He et al., ECCV 2022, "strictly COCO style"): ``annotations/SPLIT/SPLIT.json`` (in some
copies ``annotations/SPLIT.json``) and ``images/SPLIT/*.JPEG``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.coco import stream_items
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample

_SOURCE = "PartImageNet (linked from https://github.com/TACJu/PartImageNet)"


def examples(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """The parts of the split's pictures by name, one record each.

    Raises:
        DatasetError: a missing or malformed file.
    """
    folder = data / "annotations"
    candidates = (folder / split / f"{split}.json", folder / f"{split}.json")
    file = named.present("part-imagenet", candidates, _SOURCE)
    names = {item["id"]: item["name"] for item in stream_items(file, "categories.item")}
    folders = (data / "images" / split, data / "images", data / split)
    pictures = named.coco_pictures(file, names, named.Folder(folders, _SOURCE))
    return named.examples("part-imagenet", split, pictures)
