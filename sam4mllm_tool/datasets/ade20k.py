"""ADE20K (2021_17_01): objects and parts by name.

Layout (Zhou et al., IJCV 2019, https://github.com/CSAILVision/ADE20K)::

    ADE20K_2021_17_01/images/ADE/training/SCENE/KIND/NAME.jpg   NAME.json
    ADE20K_2021_17_01/images/ADE/training/SCENE/KIND/NAME/instance_000_NAME.png

with ``validation`` beside ``training``. A JSON file lists objects and their parts alike, each with
its ``raw_name``, its polygon and the file of its mask (amodal: hidden pixels are on it too). As in
the authors' notebook, expressions are the ``raw_name`` of objects and parts, boxes are those of the
polygons, and stuff classes ("sky") are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam4mllm_tool.datasets import named
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.types import Box

FOLDERS = {"train": "training", "val": "validation"}
STUFF = frozenset({
    "sky", "wall", "floor", "ceiling", "road", "trees", "plants", "buildings", "ground",
    "sidewalk", "grass", "sea water", "water", "river water", "sand", "snow", "land",
})  # fmt: skip
_SOURCE = "ADE20K_2021_17_01 (https://ade20k.csail.mit.edu/request_data)"


def examples(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
    """The names asked of the split's pictures, one record each, in the order of the paths.

    A picture whose notes cannot be read gives a record with a ``fault``.

    Raises:
        DatasetError: there are no files.
    """
    inner = Path("images/ADE") / FOLDERS[split]
    places = (data / "ADE20K_2021_17_01" / inner, data / inner)
    folder = named.present("ade20k", places, _SOURCE)
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise DatasetError(f"ade20k: no pictures in {folder}", hint=f"Download {_SOURCE}.")
    for file in files:
        try:
            picture = _picture(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = DatasetError(f"ADE20K: {file} cannot be read: {error!r}")
            yield ReferringExample.unreadable("ade20k", split, file.stem, fault)
            continue
        yield from named.examples("ade20k", split, [picture])


def _picture(file: Path) -> named.NamedPicture:
    notes = json.loads(file.read_text(encoding="utf-8"))["annotation"]
    height, width = notes["imsize"][:2]
    objects = tuple(
        named.Named(one["raw_name"], file.parent / one["instance_mask"], _box(one["polygon"]))
        for one in notes["object"]
        if one["raw_name"] not in STUFF
    )
    picture = file.with_suffix(".jpg")
    return named.NamedPicture(file.stem, picture, (width, height), objects)


def _box(polygon: dict[str, Any]) -> Box:
    x, y = polygon["x"], polygon["y"]
    return Box(float(min(x)), float(min(y)), float(max(x)), float(max(y)))
