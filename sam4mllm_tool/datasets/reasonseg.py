"""ReasonSeg in its makers' layout: ``SPLIT/NAME.jpg`` with ``SPLIT/NAME.json`` beside it.

Source: LISA (Lai et al., CVPR 2024, 2308.00692). A JSON file holds ``text`` (the expressions),
``is_sentence`` and ``shapes``: polygons labelled ``target``, or ``ignore`` for regions that do not
count. Shapes are painted from the largest to the smallest, later ones on top, outlines included;
a shape with another label (``flag``) is left out. All targets together are *one* mask. The makers
paint with OpenCV; Pillow's masks differ from its by 0.3 % of the pixels (300 random polygons).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.types import Mask

_SOURCE = "ReasonSeg (linked from https://github.com/dvlab-research/LISA)"
_TARGET, _IGNORE = 1, 255


def examples(data: Path, split: str) -> Iterator[ReferringExample]:
    """The split's pictures in the order of their names, one record each.

    A pair of files that cannot be read gives a record with a ``fault``.

    Raises:
        DatasetError: there are no files.
    """
    folder = next((f for f in (data / split, data / "ReasonSeg" / split) if f.is_dir()), None)
    files = sorted(folder.glob("*.json")) if folder else []
    if not files:
        raise DatasetError(
            f"ReasonSeg: no {split}/*.json below {data}",
            hint=f"Download {_SOURCE} and unpack it so that {data / split} holds .jpg and .json.",
        )
    for file in files:
        try:
            yield _record(file, split)
        except DatasetError as fault:
            yield ReferringExample.unreadable("reasonseg", split, file.stem, fault)


def _record(file: Path, split: str) -> ReferringExample:
    picture = file.with_suffix(".jpg")
    if not picture.exists():
        raise DatasetError(
            f"ReasonSeg: {picture} is missing",
            hint=f"Download {_SOURCE} again; files belong in pairs.",
        )
    try:
        notes = json.loads(_decoded(file.read_bytes()))
        with Image.open(picture) as opened:
            size = opened.size
        painted = paint_shapes(notes["shapes"], size)
        expressions = tuple(text.strip() for text in notes["text"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DatasetError(
            f"ReasonSeg: {file} cannot be read: {error!r}", hint="Download it again."
        ) from error
    target, ignore = Mask(painted == _TARGET), Mask(painted == _IGNORE)
    box = target.box
    return ReferringExample(
        dataset="reasonseg",
        split=split,
        example_id=file.stem,
        image_id=file.stem,
        image=picture,
        expressions=expressions,
        masks=(target.to_rle(),) if box else (),
        boxes=(box,) if box else (),
        ignore=ignore.to_rle() if ignore.area else None,
    )


def paint_shapes(shapes: list[dict[str, Any]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """1 on targets, 255 on ignored regions, 0 elsewhere: ``uint8`` of shape (height, width)."""
    layers = []
    for shape in shapes:
        label = str(shape["label"]).lower()
        corners = [(int(x), int(y)) for x, y in shape["points"]]
        if "flag" in label or not corners:
            continue
        layer = Image.new("L", size)
        draw = ImageDraw.Draw(layer)
        if len(corners) > 1:
            draw.polygon(corners, fill=1, outline=1)
            # Pillow draws a polygon's own outline a little inside of a line between its corners.
            draw.line([*corners, corners[0]], fill=1)
        else:
            draw.point(corners, fill=1)
        layers.append((np.asarray(layer, dtype=bool), _IGNORE if "ignore" in label else _TARGET))
    painted = np.zeros((size[1], size[0]), dtype=np.uint8)
    for layer_pixels, value in sorted(layers, key=lambda one: -int(one[0].sum())):
        painted[layer_pixels] = value
    return painted


def _decoded(data: bytes) -> str:
    """Most files are UTF-8; a few were saved in a Windows code page."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252")
