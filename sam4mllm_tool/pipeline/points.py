"""Candidate points to ask about, and which answers are sure enough to show to SAM."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.errors import InputError, nearest
from sam4mllm_tool.types import Box, Point, PointLabel, YesNo


@dataclass(frozen=True)
class Thresholds:
    """When an answer counts; the defaults are those of the authors' demo.

    Attributes:
        background: p_no above this makes a point background.
        foreground: else p_yes above this makes it foreground; else it stays undecided.
    """

    background: float = 0.9
    foreground: float = 0.75


def label_point(answer: YesNo, thresholds: Thresholds) -> PointLabel:
    """The label that an answer gives a point."""
    if answer.p_no > thresholds.background:
        return PointLabel.BACKGROUND
    if answer.p_yes > thresholds.foreground:
        return PointLabel.FOREGROUND
    return PointLabel.UNDECIDED


def grid_points(box: Box, count: int) -> list[Point]:
    """``count`` points spread evenly over the box, in row order.

    Rows are as equal as can be: 9 gives 3×3, 7 gives rows of 3, 2 and 2. Each point is the centre
    of its cell, so none lies on the box's border.
    """
    rows = max(1, round(math.sqrt(count)))
    points = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        y = box.y_min + (row + 0.5) / rows * box.height
        points += [
            Point(box.x_min + (column + 0.5) / columns * box.width, y) for column in range(columns)
        ]
    return points


def jittered_points(box: Box, count: int, rng: random.Random) -> list[Point]:
    """``count`` points in random order out of a jittered grid with twice as many.

    The spread of the authors' demo (15 of 30): n x n cell centres and n of the corners between
    four cells, each moved by up to 15 % of a cell. n is the smallest number for which
    ``n * n + n`` is at least ``2 * count`` (5 for 15).
    """
    side = next(n for n in range(1, count + 1) if n * n + n >= 2 * count)
    centres = [(x + 0.5, y + 0.5) for y in range(side) for x in range(side)]
    corners = [(float(x), float(y)) for y in range(1, side) for x in range(1, side)]
    spread = centres + rng.sample(corners, min(side, len(corners)))
    cells = [(u + rng.uniform(-0.15, 0.15), v + rng.uniform(-0.15, 0.15)) for u, v in spread]
    return [
        Point(box.x_min + u / side * box.width, box.y_min + v / side * box.height)
        for u, v in rng.sample(cells, count)
    ]


def poisson_disk_points(
    box: Box, count: int, rng: random.Random, radius: float = 0.1
) -> list[Point]:
    """Up to ``count`` points of the box no two of which are closer than ``radius`` box sides.

    Dart throwing (Cook, 1986): distances are measured in the unit square the box is mapped to.
    Throws 30 darts per point at most, so a full box gives fewer points than asked.
    """
    kept: list[tuple[float, float]] = []
    # What is closer than the radius lies in the dart's own cell or in one of the eight around it.
    side = radius or 1.0
    near: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(count * 30):
        if len(kept) == count:
            break
        dart = (rng.random(), rng.random())
        column, row = int(dart[0] / side), int(dart[1] / side)
        if all(math.dist(dart, other) >= radius for other in near[column, row]):
            kept.append(dart)
            for cell in product(range(column - 1, column + 2), range(row - 1, row + 2)):
                near[cell].append(dart)
    return [Point(box.x_min + u * box.width, box.y_min + v * box.height) for u, v in kept]


PATTERNS: dict[str, Callable[[Box, int], list[Point]]] = {
    "grid": grid_points,
    "poisson": lambda box, count: poisson_disk_points(box, count, random.Random(0)),
    "jittered": lambda box, count: jittered_points(box, count, random.Random(0)),
}
"""The ways to spread candidate points; each gives the same points every time."""


def candidate_points(pattern: str, box: Box, count: int) -> list[Point]:
    """Points spread over the box by a pattern of :data:`PATTERNS`.

    Raises:
        InputError: no such pattern.
    """
    if pattern not in PATTERNS:
        raise InputError(
            f"there is no pattern {pattern!r} of candidate points",
            hint=nearest(pattern, PATTERNS, "Patterns"),
        )
    return PATTERNS[pattern](box, count)


_FINE_ENOUGH = 256


def inner_points(
    regions: NDArray[np.integer], count: int, asked: Sequence[Point] = (), least: float = 0.5
) -> list[Point]:
    """Up to ``count`` pixel centres deep inside regions and far from each other, deepest first.

    A place is as deep as the largest circle around it that lies in one region and holds no point
    that was asked about; after each choice the depths are measured anew.

    Args:
        regions: shape (height, width), the number of the region a pixel belongs to; 0 = none.
        count: how many points at most.
        asked: earlier points, pixels.
        least: depth in pixels from which a place counts.
    """
    rows, columns = (np.flatnonzero(regions.any(axis=axis)) for axis in (1, 0))
    points: list[Point] = []
    if not rows.size:
        return points
    top, left = int(rows[0]), int(columns[0])
    window = regions[top : rows[-1] + 1, left : columns[-1] + 1]
    step = -(-max(window.shape) // _FINE_ENOUGH)  # measured on every step-th pixel
    window = window[::step, ::step]
    free = window > 0
    for point in asked:
        row, column = int(point.y - top) // step, int(point.x - left) // step
        if point.y >= top and point.x >= left and row < free.shape[0] and column < free.shape[1]:
            free[row, column] = False
    for _ in range(count):
        depth = step * _depth(window, free)
        if depth.max() < least:
            break
        row, column = _central(depth, np.argwhere((window > 0) & ~free))
        free[row, column] = False
        points.append(Point(left + step * column + 0.5, top + step * row + 0.5))
    return points


def _central(depth: NDArray[np.float64], taken: NDArray[np.intp]) -> tuple[int, int]:
    """Of the places about as deep as the deepest the one farthest from those that are taken.

    Without any, the one nearest to their middle: an elongated region has many deepest places.
    """
    deepest = np.argwhere(depth >= 0.9 * depth.max())
    if len(taken):
        best = np.linalg.norm(deepest[:, None] - taken[None], axis=2).min(axis=1).argmax()
    else:
        best = np.linalg.norm(deepest - deepest.mean(axis=0), axis=1).argmin()
    row, column = deepest[best]
    return int(row), int(column)


def _depth(regions: NDArray[np.integer], free: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Each free pixel's distance to the nearest one that is not free or in another region."""
    from scipy.ndimage import distance_transform_edt  # slow to import

    depth = np.zeros(regions.shape)
    for number in np.unique(regions[free]):
        region = np.pad(free & (regions == number), 1)
        depth = np.maximum(depth, distance_transform_edt(region)[1:-1, 1:-1])
    return depth
