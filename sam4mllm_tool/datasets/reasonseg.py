"""ReasonSeg in its published layout: ``SPLIT/NAME.jpg`` with ``SPLIT/NAME.json`` beside it.

Source: LISA (Lai et al., CVPR 2024, 2308.00692). A JSON file holds ``text`` (the expressions),
``is_sentence`` and ``shapes``: polygons labelled ``target``, or ``ignore`` for regions that do not
count. Shapes are painted from the largest to the smallest, outlines included, with OpenCV as in
LISA's code; a shape labelled ``flag`` is left out. All targets together are *one* mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.datasets.record import ReferringExample, frame_size, need_extra
from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.types import Mask

_SOURCE = "ReasonSeg (linked from https://github.com/dvlab-research/LISA)"
_TARGET, _IGNORE = 1, 255


def examples(data: Path, split: str, protocol: Protocol = OURS) -> Iterator[ReferringExample]:
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
            yield _record(file, split, protocol)
        except DatasetError as fault:
            yield ReferringExample.unreadable("reasonseg", split, file.stem, fault)


def _record(file: Path, split: str, protocol: Protocol) -> ReferringExample:
    picture = file.with_suffix(".jpg")
    if not picture.exists():
        raise DatasetError(
            f"ReasonSeg: {picture} is missing",
            hint=f"Download {_SOURCE} again; files belong in pairs.",
        )
    try:
        notes = json.loads(_decoded(file.read_bytes()))
        with Image.open(picture) as opened:
            size = frame_size(opened, protocol.exif)
        painted = paint_shapes(notes["shapes"], size, protocol)
        expressions = _expressions(notes["text"], protocol)
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
        exif=protocol.exif,
        decides=protocol.no_target == "statement",
    )


def _expressions(text: str | list[str], protocol: Protocol) -> tuple[str, ...]:
    texts = [text] if isinstance(text, str) and protocol.plain_text == "one" else text
    return tuple(one.strip() for one in (texts[:1] if protocol.texts == "first" else texts))


def paint_shapes(
    shapes: list[dict[str, Any]], size: tuple[int, int], protocol: Protocol = OURS
) -> NDArray[np.uint8]:
    """1 on targets, 255 on ignored regions, 0 elsewhere: ``uint8`` of shape (height, width)."""
    labels = [str(shape["label"]).lower() for shape in shapes]
    kept = [
        (_IGNORE if "ignore" in label else _TARGET, np.array([shape["points"]], dtype=np.int32))
        for label, shape in zip(labels, shapes, strict=True)
        if shape["points"] and not _is_flag(label, protocol)
    ]
    areas = np.array([_paint(np.zeros(size[::-1], np.uint8), corners, 1).sum()
                      for _, corners in kept], dtype=np.uint64)  # fmt: skip
    order = np.argsort(areas)[::-1]
    if protocol.ties == "later":
        order = np.argsort(-areas.astype(np.int64), kind="stable")
    painted = np.zeros(size[::-1], np.uint8)
    for place in order:
        value, corners = kept[place]
        _paint(painted, corners, value)
    return painted


def _is_flag(label: str, protocol: Protocol) -> bool:
    return label == "flag" if protocol.flag == "exact" else "flag" in label


def _paint(pixels: NDArray[np.uint8], corners: NDArray[np.int32], value: int) -> NDArray[np.uint8]:
    """A polygon with its outline."""
    cv2 = need_extra("cv2")
    cv2.polylines(pixels, corners, True, value, 1)
    cv2.fillPoly(pixels, corners, value)
    return pixels


def _decoded(data: bytes) -> str:
    """Most files are UTF-8; a few were saved in a Windows code page."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252")
