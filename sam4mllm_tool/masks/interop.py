"""Conversion of masks to and from numpy, PIL, COCO, LabelMe, supervision and datasets.

Everything starts from and returns to a list of :class:`LabelledMask`; every pair round-trips to
the same pixels. Coordinates are pixels of the upright image, box maxima exclusive.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.masks.coco import segmentation_to_rle
from sam4mllm_tool.masks.polygons import mask_to_polygons, polygons_to_mask
from sam4mllm_tool.types import Mask

if TYPE_CHECKING:
    import supervision
    from datasets import Features

LABELME_VERSION = "5.5.0"


class LabelledMask(NamedTuple):
    """A mask with its label, and its box's score and its handle if it has them."""

    name: str
    mask: Mask
    score: float | None = None
    object_id: str = ""


# -- numpy and PIL -------------------------------------------------------------------------------


def to_array(masks: Sequence[LabelledMask]) -> NDArray[np.bool_]:
    """``bool`` of shape (n, height, width)."""
    if not masks:
        return np.zeros((0, 0, 0), dtype=bool)
    return np.stack([one.mask.pixels for one in masks])


def from_array(array: NDArray[Any], names: Sequence[str]) -> list[LabelledMask]:
    """From (n, height, width); pixels that are not zero are on the object."""
    return [LabelledMask(n, Mask(a != 0)) for n, a in zip(names, array, strict=True)]


def to_pil(masks: Sequence[LabelledMask]) -> list[Image.Image]:
    """Pictures of mode "L": 255 on the object, 0 elsewhere."""
    return [one.mask.to_pil() for one in masks]


def from_pil(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[LabelledMask]:
    """From pictures of any one-channel mode; pixels that are not zero are on the object."""
    return [
        LabelledMask(n, Mask(np.asarray(p.convert("L")) != 0))
        for n, p in zip(names, pictures, strict=True)
    ]


# -- COCO and polygons ---------------------------------------------------------------------------


def from_coco(document: dict[str, Any]) -> list[LabelledMask]:
    """From a COCO document of one image, masks as RLE or polygons.

    Raises:
        InputError: the document does not contain exactly one image.
    """
    if len(document["images"]) != 1:
        raise InputError(
            f"the document contains {len(document['images'])} images",
            hint="Give one image at a time.",
        )
    (image,) = document["images"]
    names = {category["id"]: category["name"] for category in document["categories"]}
    return [
        LabelledMask(
            names[one["category_id"]],
            Mask.from_rle(
                segmentation_to_rle(one["segmentation"], image["width"], image["height"])
            ),
        )
        for one in document["annotations"]
    ]


# -- LabelMe -------------------------------------------------------------------------------------


def to_labelme(
    masks: Sequence[LabelledMask],
    image_path: str,
    width: int,
    height: int,
    *,
    shapes: Literal["mask", "polygon"] = "mask",
) -> dict[str, Any]:
    """A LabelMe document.

    ``"mask"`` shapes are exact in LabelMe; ``"polygon"`` shapes can be edited there, and the
    polygons of one object share a ``group_id``. Empty masks have no shape and are left out.
    """
    make = _mask_shape if shapes == "mask" else _polygon_shapes
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": [s for number, one in enumerate(masks) for s in make(number, one)],
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def from_labelme(document: dict[str, Any]) -> list[LabelledMask]:
    """From a LabelMe document with mask and polygon shapes; shapes of a group are one object.

    Raises:
        InputError: a shape of another type.
    """
    width, height = document["imageWidth"], document["imageHeight"]
    found: dict[Any, LabelledMask] = {}
    for number, shape in enumerate(document["shapes"]):
        group = shape.get("group_id")
        key = ("single", number) if group is None else ("group", group)
        mask = _shape_mask(shape, width, height)
        if key in found:
            mask = Mask(found[key].mask.pixels | mask.pixels)
        found[key] = LabelledMask(shape["label"], mask)
    return list(found.values())


def _shape(label: str, number: int, kind: str, points: list[list[float]]) -> dict[str, Any]:
    return {
        "label": label,
        "points": points,
        "group_id": number,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }


def _mask_shape(number: int, one: LabelledMask) -> list[dict[str, Any]]:
    """LabelMe keeps the part within the box, whose last row and column are included."""
    if one.mask.box is None:
        return []
    left, top, right, bottom = map(int, one.mask.box)
    buffer = io.BytesIO()
    Image.fromarray(one.mask.pixels[top:bottom, left:right]).save(buffer, "PNG")
    points: list[list[float]] = [[left, top], [right - 1, bottom - 1]]
    shape = _shape(one.name, number, "mask", points)
    return [{**shape, "mask": base64.b64encode(buffer.getvalue()).decode("ascii")}]


def _polygon_shapes(number: int, one: LabelledMask) -> list[dict[str, Any]]:
    return [
        _shape(one.name, number, "polygon", [list(p) for p in zip(xy[::2], xy[1::2], strict=True)])
        for xy in mask_to_polygons(one.mask)
    ]


def _shape_mask(shape: dict[str, Any], width: int, height: int) -> Mask:
    match shape["shape_type"]:
        case "polygon":
            flat = [float(number) for point in shape["points"] for number in point]
            return polygons_to_mask([flat], width, height)
        case "mask":
            crop = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) != 0
            left, top = (int(number) for number in shape["points"][0])
            pixels = np.zeros((height, width), dtype=bool)
            pixels[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
            return Mask(pixels)
        case kind:
            raise InputError(
                f"a LabelMe shape of type {kind!r} is not a mask",
                hint="Use shapes of type 'mask' or 'polygon'.",
            )


# -- supervision ---------------------------------------------------------------------------------


def to_detections(masks: Sequence[LabelledMask]) -> supervision.Detections:
    """``supervision.Detections`` with masks, boxes, scores (NaN if unknown) and ``class_name``."""
    try:
        from supervision import Detections
    except ImportError as error:
        raise ImportError(
            'supervision is missing: pip install "sam4mllm-tool[supervision]"'
        ) from error
    if not masks:
        return Detections.empty()
    names = list(dict.fromkeys(one.name for one in masks))
    scores = [np.nan if one.score is None else one.score for one in masks]
    return Detections(
        xyxy=np.array([one.mask.box or (0, 0, 0, 0) for one in masks], dtype=np.float32),
        mask=to_array(masks),
        confidence=np.array(scores, dtype=np.float32),
        class_id=np.array([names.index(one.name) for one in masks]),
        data={"class_name": np.array([one.name for one in masks])},
    )


def from_detections(detections: supervision.Detections) -> list[LabelledMask]:
    """From detections with masks.

    Raises:
        InputError: they have no masks.
    """
    if len(detections) == 0:
        return []
    if detections.mask is None:
        raise InputError("the detections have no masks", hint="Segment their boxes first.")
    numbers = detections.class_id if detections.class_id is not None else range(len(detections))
    names = detections.data.get("class_name", [str(number) for number in numbers])
    scores = detections.confidence
    return [
        LabelledMask(
            str(name),
            Mask(np.asarray(detections.mask[n], dtype=bool)),
            None if scores is None or np.isnan(scores[n]) else float(scores[n]),
        )
        for n, name in enumerate(names)
    ]


# -- datasets ------------------------------------------------------------------------------------


def to_rows(masks: Sequence[LabelledMask]) -> list[dict[str, Any]]:
    """One row per object, of plain values: ``datasets.Dataset.from_list(rows, features())``."""
    return [
        {
            "name": one.name,
            "box": list(one.mask.box or (0.0, 0.0, 0.0, 0.0)),
            "score": one.score,
            "area": one.mask.area,
            "rle": one.mask.to_rle(),
        }
        for one in masks
    ]


def from_rows(rows: Iterable[dict[str, Any]]) -> list[LabelledMask]:
    """From rows, e.g. of a ``datasets.Dataset``."""
    return [LabelledMask(r["name"], Mask.from_rle(r["rle"]), r["score"]) for r in rows]


def features() -> Features:
    """The types of :func:`to_rows`' columns."""
    try:
        from datasets import Features, List, Value
    except ImportError as error:
        raise ImportError('datasets is missing: pip install "sam4mllm-tool[datasets]"') from error
    return Features(
        {
            "name": Value("string"),
            "box": List(Value("float64"), length=4),
            "score": Value("float64"),
            "area": Value("int64"),
            "rle": {"size": List(Value("int64"), length=2), "counts": Value("string")},
        }
    )
