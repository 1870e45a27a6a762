"""The outcome of one expression: its prediction compared with its truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sam4mllm_tool.evaluation.places import Place
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.types import Box, Mask


class PointOutcome(NamedTuple):
    """One answered point, and whether it lies on the true mask.

    ``u`` and ``v`` say where it lies in the box that was asked about, 0…1 from left and top;
    ``place``, on what.
    """

    p_yes: float
    p_no: float
    inside: bool
    u: float = 0.5
    v: float = 0.5
    place: Place | None = None

    @property
    def says_inside(self) -> bool:
        """The answer, without thresholds."""
        return self.p_yes > self.p_no

    @property
    def right(self) -> bool:
        """Whether the answer is true."""
        return self.says_inside == self.inside


class StatedPoint(NamedTuple):
    """A point that a PPG reply states to be on the target or off it, and whether it is on it."""

    stated: bool
    inside: bool


@dataclass(frozen=True)
class Outcome:
    """The outcome of one expression; areas in pixels.

    Attributes:
        case: id of the expression in its data set.
        image: id of its image, the unit of resampling.
        truth_area, predicted_area: 0 means no target, or nothing predicted.
        box_iou: as :func:`match_boxes` gives it; ``None`` without target.
        said_target: whether the model stated that there is a target, if that was asked as a
            separate question; ``None`` = whether anything was predicted.
        decides: whether ``said_target`` also decides the IoU, as ReLA's no-target head does.
        points: answered points.
        stated: points of PPG replies.
        questions, seconds: spent on this expression.
        kind: of expression, for tables by kind.
    """

    case: str
    image: str
    intersection: int
    truth_area: int
    predicted_area: int
    box_iou: float | None = None
    points: tuple[PointOutcome, ...] = ()
    stated: tuple[StatedPoint, ...] = ()
    said_target: bool | None = None
    decides: bool = False
    questions: int = 0
    seconds: float = 0.0
    kind: str = ""

    @property
    def has_target(self) -> bool:
        """Whether the expression means something in the image."""
        return self.truth_area > 0

    @property
    def answered_target(self) -> bool:
        """Whether the answer is that there is a target."""
        return self.predicted_area > 0 if self.said_target is None else self.said_target

    @property
    def union(self) -> int:
        """Pixels in either mask."""
        return self.truth_area + self.predicted_area - self.intersection

    @property
    def counted(self) -> tuple[int, int]:
        """(intersection, union) as they count in cIoU."""
        if not self.decides or self.answered_target:
            return self.intersection, self.union
        return 0, self.union if self.has_target else 0

    @property
    def iou(self) -> float:
        """IoU of the masks; 1 for a right refusal (gRefCOCO's convention)."""
        intersection, union = self.counted
        return intersection / union if union else float(not self.decides or self._rightly_refused)

    @property
    def _rightly_refused(self) -> bool:
        return not self.has_target and not self.answered_target

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; see :meth:`from_json`."""
        lists = {"points": [list(p) for p in self.points], "stated": [list(p) for p in self.stated]}
        return {**vars(self), **lists}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """The inverse of :meth:`to_json`."""
        points = tuple(PointOutcome(*point) for point in data["points"])
        stated = tuple(StatedPoint(*point) for point in data.get("stated", ()))
        return cls(**{**data, "points": points, "stated": stated})


def compare_masks(
    predicted: Sequence[Mask], truth: Sequence[Mask], ignore: Mask | None = None
) -> tuple[int, int, int]:
    """(intersection, truth area, predicted area) of the united masks, in pixels.

    Pixels of ``ignore`` count in none of the three (ReasonSeg's ignored regions).

    Raises:
        ValueError: masks of different sizes.
    """
    union_a, union_b = _united(predicted, ignore), _united(truth, ignore)
    if union_a is None or union_b is None:
        return (
            0,
            0 if union_b is None else int(union_b.sum()),
            (0 if union_a is None else int(union_a.sum())),
        )
    if union_a.shape != union_b.shape:
        raise ValueError(f"a mask of shape {union_a.shape} against a truth of {union_b.shape}")
    return int((union_a & union_b).sum()), int(union_b.sum()), int(union_a.sum())


def match_boxes(predicted: Sequence[Box], truth: Sequence[Box]) -> float | None:
    """The worst IoU of the best one-to-one pairing; 0 if the numbers differ, ``None`` without
    truth. For one box each it is their IoU.
    """
    if not truth:
        return None
    if len(predicted) != len(truth):
        return 0.0
    table = np.array([[box_iou(one, other) for other in truth] for one in predicted])
    return float(table[linear_sum_assignment(table, maximize=True)].min())


def _united(masks: Sequence[Mask], ignore: Mask | None) -> NDArray[np.bool_] | None:
    if not masks:
        return None
    united: NDArray[np.bool_] = np.logical_or.reduce([mask.pixels for mask in masks])
    return united & ~ignore.pixels if ignore else united
