"""The coordinate grids of the model families, and their conversion from and to pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Size = tuple[int, int]
"""(width, height) of the upright image in pixels."""


class Grid(Protocol):
    """A coordinate grid laid over the image."""

    def extent(self, size: Size) -> tuple[float, float]:
        """The numbers that the image's right and bottom edges have in this grid."""


@dataclass(frozen=True)
class RelativeGrid:
    """0 at the left (top) edge, ``steps`` at the right (bottom) edge, whatever the image's size."""

    steps: int

    def extent(self, size: Size) -> tuple[float, float]:
        """``(steps, steps)``."""
        return float(self.steps), float(self.steps)


PER_MILLE = RelativeGrid(1000)


@dataclass(frozen=True)
class ResizedPixelGrid:
    """Pixels of the picture after the processor's "smart resize".

    Both sides become multiples of ``factor``, the area is brought between ``min_pixels`` and
    ``max_pixels``, and the aspect ratio is kept as nearly as that allows (Qwen2-VL, arXiv
    2409.12191, section 2.1). The limits must be those of the checkpoint's own processor.
    """

    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384

    def extent(self, size: Size) -> tuple[float, float]:
        """(width, height) of the resized picture."""
        width, height = smart_resize(size, self.factor, self.min_pixels, self.max_pixels)
        return float(width), float(height)

    @classmethod
    def from_processor(cls, config: Mapping[str, Any]) -> ResizedPixelGrid:
        """The pixel limits in a ``preprocessor_config.json``, with its old or its new keys."""
        size = config.get("size") or {}
        return cls(
            factor=config.get("patch_size", 14) * config.get("merge_size", 2),
            min_pixels=config.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
            max_pixels=config.get("max_pixels") or size.get("longest_edge") or cls.max_pixels,
        )


def smart_resize(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Size (width, height) that a Qwen-VL processor gives a picture of ``size``."""
    # A side below half a factor is rounded to nothing; the area is then 0, and the picture grows.
    rounded = [round(side / factor) * factor for side in size]
    area = rounded[0] * rounded[1]
    if max(min_pixels, 1) <= area <= max_pixels:
        return rounded[0], rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(size[0] * size[1] / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
    else:
        grow = math.sqrt(max(min_pixels, 1) / (size[0] * size[1]))
        fitted = [math.ceil(side * grow / factor) * factor for side in size]
    return fitted[0], fitted[1]


DEFAULT_RESIZED = ResizedPixelGrid()
