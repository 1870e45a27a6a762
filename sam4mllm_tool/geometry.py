"""Pixel and box arithmetic shared by formats, points and tools."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sam4mllm_tool.types import Box


def to_grid(value: float, side: float, steps: int = 1000) -> int:
    """Pixel coordinate → integer 0…steps-1 of ``side`` (values outside are clamped)."""
    return min(steps - 1, max(0, math.floor(value / side * steps)))


def from_grid(number: float, side: float, steps: int = 1000) -> float:
    """Integer of the grid → pixel coordinate at the middle of its cell."""
    return (number + 0.5) / steps * side


def clip_box(box: Box, width: float, height: float) -> Box:
    """The part of the box inside an image of that size."""
    return Box(
        min(max(box.x_min, 0.0), width),
        min(max(box.y_min, 0.0), height),
        min(max(box.x_max, 0.0), width),
        min(max(box.y_max, 0.0), height),
    )


def intersection(a: Box, b: Box) -> Box | None:
    """The overlap of two boxes, ``None`` if they do not overlap."""
    overlap = Box(
        max(a.x_min, b.x_min),
        max(a.y_min, b.y_min),
        min(a.x_max, b.x_max),
        min(a.y_max, b.y_max),
    )
    return overlap if overlap.width > 0 and overlap.height > 0 else None


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 if both are empty."""
    overlap = intersection(a, b)
    shared = overlap.area if overlap else 0.0
    union = a.area + b.area - shared
    return shared / union if union > 0 else 0.0


def different_boxes(boxes: Sequence[Box], limit: int, most_iou: float = 0.7) -> list[int]:
    """Positions of up to ``limit`` boxes, in order, none of which repeats an earlier one.

    Greedy non-maximum suppression, for boxes in the order of belief.

    Args:
        boxes: the best first.
        limit: how many to keep at most.
        most_iou: with an IoU above this, a box repeats the one it overlaps.
    """
    kept: list[int] = []
    for position, box in enumerate(boxes):
        if len(kept) == limit:
            break
        if all(box_iou(box, boxes[other]) <= most_iou for other in kept):
            kept.append(position)
    return kept


def union_box(boxes: Iterable[Box]) -> Box:
    """The smallest box around all boxes (at least one)."""
    corners = list(boxes)
    return Box(
        min(b.x_min for b in corners),
        min(b.y_min for b in corners),
        max(b.x_max for b in corners),
        max(b.y_max for b in corners),
    )
