"""Masks as COCO polygons that rasterise back to exactly the same pixels.

Polygons run along pixel edges. A polygon cannot represent a hole, so a piece with a hole is cut in
two through the hole; the union of all polygons is the mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sam4mllm_tool.types import Mask

Pixels = NDArray[np.bool_]


def mask_to_polygons(mask: Mask) -> list[list[float]]:
    """Polygons ``[x1, y1, x2, y2, …]`` in pixels whose union is the mask; none if it is empty."""
    return [_outline(piece, x, y) for piece, x, y in _pieces(mask.pixels, 0, 0)]


def polygons_to_mask(polygons: list[list[float]], width: int, height: int) -> Mask:
    """The union of polygons as a mask (pycocotools' rasterisation)."""
    if not polygons:
        return Mask(np.zeros((height, width), dtype=bool))
    rles = coco_mask.frPyObjects(polygons, height, width)
    return Mask(coco_mask.decode(coco_mask.merge(rles)).astype(bool))


def _pieces(pixels: Pixels, x: int, y: int) -> Iterator[tuple[Pixels, int, int]]:
    """4-connected pieces without holes, each with the offset of its window."""
    from scipy.ndimage import binary_fill_holes, label  # slow to import, so not at server start

    numbered, count = label(pixels)
    for number in range(1, count + 1):
        piece = numbered == number
        rows = np.flatnonzero(piece.any(axis=1))
        columns = np.flatnonzero(piece.any(axis=0))
        window = piece[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        left, top = x + int(columns[0]), y + int(rows[0])
        holes = binary_fill_holes(window) & ~window
        if not holes.any():
            yield window, left, top
            continue
        # The cut runs through a hole, never along the window's border, so both halves shrink.
        cut = int(np.flatnonzero(holes.any(axis=0))[0])
        yield from _pieces(window[:, :cut], left, top)
        yield from _pieces(window[:, cut:], left + cut, top)


def _outline(piece: Pixels, x: int, y: int) -> list[float]:
    """The border of a piece without holes, clockwise on screen, corners only."""
    padded = np.pad(piece, 1)
    inside = padded[1:-1, 1:-1]
    follows: dict[tuple[int, int], tuple[int, int]] = {}
    for row, column in np.argwhere(inside & ~padded[:-2, 1:-1]):  # open to the top: go right
        follows[(column, row)] = (column + 1, row)
    for row, column in np.argwhere(inside & ~padded[1:-1, 2:]):  # open to the right: go down
        follows[(column + 1, row)] = (column + 1, row + 1)
    for row, column in np.argwhere(inside & ~padded[2:, 1:-1]):  # open below: go left
        follows[(column + 1, row + 1)] = (column, row + 1)
    for row, column in np.argwhere(inside & ~padded[1:-1, :-2]):  # open to the left: go up
        follows[(column, row + 1)] = (column, row)
    start = here = next(iter(follows))
    path = [start]
    while (here := follows[here]) != start:
        path.append(here)
    corners = [
        (px, py)
        for (ax, ay), (px, py), (bx, by) in zip(
            [path[-1], *path[:-1]], path, [*path[1:], path[0]], strict=True
        )
        if not (ax == px == bx or ay == py == by)
    ]
    return [float(value) for px, py in corners for value in (px + x, py + y)]
