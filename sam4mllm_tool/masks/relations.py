"""Spatial relations of two masks of one image."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.types import Mask

Side = Literal["left_of", "right_of", "above", "below", "overlapping"]


def mask_iou(a: Mask, b: Mask) -> float:
    """Intersection over union in pixels; 1 for two empty masks (they are equal)."""
    union = int((a.pixels | b.pixels).sum())
    return int((a.pixels & b.pixels).sum()) / union if union else 1.0


def share_inside(a: Mask, b: Mask) -> float:
    """Share of a's pixels that b covers too, 0 for an empty a."""
    return int((a.pixels & b.pixels).sum()) / a.area if a.area else 0.0


def centroid(mask: Mask) -> tuple[float, float] | None:
    """Mean (x, y) of the mask's pixel centres, ``None`` if empty."""
    if not mask.area:
        return None
    rows, columns = np.nonzero(mask.pixels)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def mask_distance(a: Mask, b: Mask) -> float:
    """Smallest gap between the masks in pixels; 0 if they touch or overlap, inf if one is empty."""
    from scipy.spatial import cKDTree  # slow to import, so not at server start

    if not a.area or not b.area:
        return float("inf")
    if (a.pixels & b.pixels).any():
        return 0.0
    gaps, _ = cKDTree(_rim(a.pixels)).query(_rim(b.pixels))
    # Centres of two neighbouring pixels are one apart, and there is no gap between them.
    return max(0.0, float(np.min(gaps)) - 1.0)


def relative_position(a: Mask, b: Mask) -> list[Side]:
    """Where a lies as seen from b: the axes on which the centroids differ clearly.

    "Clearly" is more than a tenth of the two masks' mean extent along that axis.
    """
    here, there, box_a, box_b = centroid(a), centroid(b), a.box, b.box
    if here is None or there is None or box_a is None or box_b is None:
        return []
    sides: list[Side] = []
    dx, dy = here[0] - there[0], here[1] - there[1]
    if abs(dx) > 0.05 * (box_a.width + box_b.width):
        sides.append("left_of" if dx < 0 else "right_of")
    if abs(dy) > 0.05 * (box_a.height + box_b.height):
        sides.append("above" if dy < 0 else "below")
    if (a.pixels & b.pixels).any():
        sides.append("overlapping")
    return sides


def combine(how: Literal["union", "intersect", "subtract"], masks: list[Mask]) -> Mask:
    """All pixels, the shared ones, or the first mask without the others."""
    first, *others = [mask.pixels for mask in masks]
    result = first.copy()
    for other in others:
        if how == "union":
            result |= other
        elif how == "intersect":
            result &= other
        else:
            result &= ~other
    return Mask(result)


def _rim(pixels: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(row, column) of the mask's border pixels."""
    from scipy.ndimage import binary_erosion

    return np.argwhere(pixels & ~binary_erosion(pixels))
