"""The one record that every data set becomes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.types import Box, Mask, RgbImage, TargetCount


def need_extra(module: str) -> Any:
    """A module that only readers of published data sets need.

    Raises:
        DatasetError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"reading this data set needs {module.partition('.')[0]}",
            hint="Install it: pip install 'sam4mllm-tool[eval]'.",
        ) from error


Rle = dict[str, Any]
"""COCO run-length encoding: ``{"size": [height, width], "counts": str}``."""


@dataclass(frozen=True)
class ReferringExample:
    """Expressions that all mean the same object(s) of one image.

    Attributes:
        dataset, split: where it is from.
        example_id: unique within the data set's split (a ``ref_id``, a file name).
        image_id: of the picture, to keep expressions on one image together.
        image: a file, or the encoded bytes where the data set holds them inside.
        expressions: each is judged by itself.
        masks: one per target object, as RLE or as a picture file whose pixels above 0 are on it;
            empty means that the expressions have no target here.
        boxes: one per mask, pixels of the image, as in the data set's files.
        ignore: pixels that count neither for nor against a prediction.
        count: how many targets the data set lets an expression have.
        kind: of expression, where the data set has this information.
        neighbours: masks of the picture's other objects; ``None`` if the data set does not
            annotate them.
        scored: the targets' masks at ``scored_size`` (width, height), where masks are compared at
            another size than the picture's.
        exif: see :class:`~sam4mllm_tool.datasets.protocol.Protocol`.
        decides: whether the model's statement that nothing is there counts in the IoU.
        fault: why the record cannot be read, if so: :meth:`open_image` raises it, and a run over
            many records can skip this one.
    """

    dataset: str
    split: str
    example_id: str
    image_id: str
    image: Path | bytes
    expressions: tuple[str, ...]
    masks: tuple[Rle | Path, ...]
    boxes: tuple[Box, ...]
    ignore: Rle | None = None
    count: TargetCount = TargetCount.ONE
    kind: str = ""
    neighbours: tuple[Rle, ...] | None = None
    scored: tuple[Rle, ...] = ()
    scored_size: tuple[int, int] | None = None
    exif: Literal["fit", "upright", "stored"] = "fit"
    decides: bool = False
    fault: DatasetError | None = None

    @classmethod
    def unreadable(
        cls, dataset: str, split: str, example_id: str, fault: DatasetError
    ) -> ReferringExample:
        """A record that cannot be read; it counts as one case."""
        return cls(dataset, split, example_id, example_id, b"", ("",), (), (), fault=fault)

    def open_image(self) -> RgbImage:
        """The picture.

        Raises:
            DatasetError: its size is not that of the masks, or the record cannot be read.
            ImageError: it cannot be read.
        """
        if self.fault is not None:
            raise self.fault
        image = load_image(self.image).image
        if self.exif == "stored" or (self.exif == "fit" and not self._fits(image)):
            image = _as_stored(self.image)
        for mask in self.masks:
            size = _mask_size(mask)
            if size != image.size:
                raise DatasetError(
                    f"{self.example_id}: the image is {image.width}×{image.height}, its mask "
                    f"{size[0]}×{size[1]}",
                    hint="The image folder does not belong to these annotations.",
                )
        return image

    def _fits(self, image: RgbImage) -> bool:
        return all(_mask_size(mask) == image.size for mask in self.masks)

    def truth(self) -> list[Mask]:
        """The targets' masks, decoded.

        Raises:
            DatasetError: a mask's file cannot be read.
        """
        return [mask_of(mask) for mask in self.masks]

    def others(self) -> list[Mask] | None:
        """The neighbours' masks, decoded; ``None`` if they are not known."""
        return None if self.neighbours is None else [Mask.from_rle(r) for r in self.neighbours]

    def scored_truth(self) -> list[Mask]:
        """The targets' masks at ``scored_size``, decoded."""
        return [Mask.from_rle(rle) for rle in self.scored]

    def ignored(self) -> Mask | None:
        """The region that does not count, decoded."""
        return Mask.from_rle(self.ignore) if self.ignore else None

    def cases(self) -> Iterator[tuple[str, str]]:
        """(id, expression) of each expression; the id is unique within the split."""
        for number, expression in enumerate(self.expressions):
            yield f"{self.example_id}:{number}", expression


def mask_of(mask: Rle | Path) -> Mask:
    """A mask from its RLE or file.

    Raises:
        DatasetError: the file cannot be read.
    """
    if not isinstance(mask, Path):
        return Mask.from_rle(mask)
    try:
        with Image.open(mask) as opened:
            pixels = np.asarray(opened)
    except (OSError, ValueError) as error:
        raise DatasetError(f"the mask {mask} cannot be read: {error}") from error
    on = np.asarray(pixels > 0)
    return Mask(on if on.ndim == 2 else np.logical_or.reduce(on, axis=2))


def _mask_size(mask: Rle | Path) -> tuple[int, int]:
    """(width, height)."""
    if not isinstance(mask, Path):
        return mask["size"][1], mask["size"][0]
    try:
        with Image.open(mask) as opened:
            return opened.size
    except (OSError, ValueError) as error:
        raise DatasetError(f"the mask {mask} cannot be read: {error}") from error


def _as_stored(source: Path | bytes) -> RgbImage:
    """A picture that is known to be readable, its EXIF orientation ignored."""
    with Image.open(source if isinstance(source, Path) else BytesIO(source)) as opened:
        return load_image(np.asarray(opened.convert("RGB"))).image


def frame_size(opened: Image.Image, exif: str) -> tuple[int, int]:
    """(width, height) of an opened picture, upright unless it is taken as stored."""
    turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8) and exif != "stored"
    width, height = opened.size
    return (height, width) if turned else (width, height)
