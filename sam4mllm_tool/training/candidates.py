"""The box and the points of a round-2 question in the training dialogues.

A model that is asked about evenly spread points learns to distinguish things from background: few
points of a box lie on *another* object, and a picture without neighbours has none. Here such points
can be asked about more often (``hard_points``), with boxes as inexact as those of round 1
(``jitter``) and with boxes that hold a neighbour too (``shared_boxes``). The latter boxes and their
points are the same for both objects, so that only the expression decides the answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

from sam4mllm_tool.geometry import intersection, union_box
from sam4mllm_tool.pipeline.points import grid_points, poisson_disk_points
from sam4mllm_tool.types import Box, Mask, Point


@dataclass(frozen=True)
class Candidates:
    """How the box and the points of a round-2 question are drawn.

    Attributes:
        spread, radius: some of up to ``spread`` Poisson-disk points of the box are asked, no two
            closer than ``radius`` box sides.
        asked: fewest and most points of a question.
        normal: mean and deviation of their number, rounded down and clipped to ``asked``; without
            it all numbers are equally likely.
        grids: share of questions about an even grid over the box, in row order, as the pipeline
            spreads its candidates; the published recipe asks no such questions.
        jitter: each edge of the box moves by up to this share of its side.
        hard_points: share of a question's points off the object that are moved onto other objects
            in the box, where there are any: as many points as before are on the object. In a
            shared box, share of the points off all objects, moved onto any.
        shared_boxes: share of questions whose box holds a neighbour too, where one overlaps it.
    """

    spread: int = 100
    radius: float = 0.1
    asked: tuple[int, int] = (1, 30)
    normal: tuple[float, float] | None = None
    grids: float = 0.0
    jitter: float = 0.1
    hard_points: float = 0.0
    shared_boxes: float = 0.0

    def draw(
        self, box: Box, mask: Mask, others: Sequence[Mask], rng: random.Random, key: str
    ) -> tuple[Box, list[Point]]:
        """The box and the points of a question about an object in ``box``.

        Args:
            box: around the object, pixels.
            mask: the object's.
            others: masks of the picture's other objects.
            rng: decides all but what a shared box's questions have in common.
            key: of the picture: with the shared box it decides that box's points.
        """
        if self.shared_boxes and rng.random() < self.shared_boxes:
            near = [other.box for other in others if other.box and intersection(box, other.box)]
            if near:
                both = union_box((box, rng.choice(near)))
                rng = random.Random(f"{key}/{tuple(both)}")
                objects = [mask, *others]
                return both, self._points(both, objects, objects, rng)
        asked = jittered(box, self.jitter, (mask.width, mask.height), rng)
        return asked, self._points(asked, [mask], others, rng)

    def _number(self, rng: random.Random) -> int:
        fewest, most = self.asked
        if self.normal is None:
            return rng.randint(fewest, most)
        return int(max(fewest, min(most, rng.normalvariate(*self.normal))))

    def _points(
        self, box: Box, kept: Sequence[Mask], hard: Sequence[Mask], rng: random.Random
    ) -> list[Point]:
        """Points of the box, some of those that are not on ``kept`` moved onto ``hard``."""
        number = self._number(rng)
        if self.grids and rng.random() < self.grids:
            points = grid_points(box, number)
        else:
            spread = poisson_disk_points(box, self.spread, rng, self.radius)
            points = rng.sample(spread, min(number, len(spread)))
        places = _pixels_in(box, hard) if self.hard_points else np.empty((0, 2), dtype=int)
        if not len(places):
            return points
        moved = list(points)
        for number, point in enumerate(points):
            if not any(mask.contains(*point) for mask in kept) and rng.random() < self.hard_points:
                row, column = places[rng.randrange(len(places))]
                moved[number] = Point(float(column) + 0.5, float(row) + 0.5)
        return moved


def jittered(box: Box, share: float, size: tuple[int, int], rng: random.Random) -> Box:
    """Each edge moved by up to ``share`` of its side, inside the picture, never empty."""

    def move(value: float, side: float, limit: int) -> float:
        moved = value + rng.uniform(-1, 1) * share * side
        return min(max(moved, 0.0), float(limit))

    width, height = size
    x = sorted((move(box.x_min, box.width, width), move(box.x_max, box.width, width)))
    y = sorted((move(box.y_min, box.height, height), move(box.y_max, box.height, height)))
    moved = Box(x[0], y[0], x[1], y[1])
    return moved if moved.area > 0 else box


def _pixels_in(box: Box, masks: Sequence[Mask]) -> np.ndarray:
    """(row, column) of the box's pixels on any of the masks, N x 2."""
    if not masks:
        return np.empty((0, 2), dtype=int)
    x0, y0, x1, y1 = (max(int(edge), 0) for edge in box)
    window = np.logical_or.reduce([mask.pixels[y0:y1, x0:x1] for mask in masks])
    return np.argwhere(window) + np.array([y0, x0])


def well_inside(region: np.ndarray, share: float, among: np.ndarray | None = None) -> np.ndarray:
    """Pixels of a bool H x W region at least ``share`` as deep in it as the deepest of them.

    Depth is the distance to the region's outside, of which the picture's border is no part.
    ``among``: the pixels of the region that are wanted (all).
    """
    wanted = region if among is None else among
    if not wanted.any():
        return wanted
    depth = distance_transform_edt(region)
    found: np.ndarray = wanted & (depth >= share * depth[wanted].max())
    return found
