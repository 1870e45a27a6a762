"""The field's metrics for referring segmentation, as ratios of sums over expressions.

Definitions and pitfalls:

* **cIoU** (also *overall* or *cumulative IoU*, oIoU): all intersections over all unions. Large
  objects weigh most. The number that RefCOCO papers print (Ding et al., VLT, 2108.05565; LAVT).
* **gIoU** (Liu et al., GRES, CVPR 2023, 2306.00968, section 4): the mean of per-expression IoUs,
  where a no-target expression counts 1 if nothing was predicted and 0 otherwise. On data without
  no-target expressions (ReasonSeg: LISA, 2308.00692) it is the plain mean.
* **mIoU**: the mean over expressions *with* a target only. It equals gIoU on RefCOCO and differs
  on gRefCOCO, so the two must not be mixed up in a table.
* **Pr@X**: share of expressions with a target whose IoU is at least X (gRefCOCO's own evaluator
  counts it so; older code used ``>``).
* **N-acc / T-acc** (GRES): share of no-target expressions answered with nothing, and of target
  expressions answered with something. A model can raise one by giving up the other.
* **box Acc@0.5**: share of target expressions whose box has IoU >= 0.5 with the true box. With
  several targets an expression counts if boxes and targets pair up one to one, each pair with IoU
  >= 0.5: GREC's "F1 = 1" (He et al., 2308.16182).

Pitfalls: a false alarm on a no-target expression adds its area to cIoU's union (intersection 0), a
right refusal adds nothing to either. An empty prediction for a target has IoU 0, not 0/0. Masks of
several objects are united first: everything here is *per expression*, not per object and not per
image; an object with several expressions counts several times. GRES sets masks of fewer than 50
pixels to empty for models without a no-target output; our models have one, so this is not done.

Point metrics compare answers with the true mask. *Balanced* accuracy is the mean of the accuracy
on inside and on outside points: with a box around the object most points are inside, and always
saying yes would look good. **ECE** (Naeini et al., AAAI 2015; Guo et al., 1706.04599): points are
put in ten equal bins of p_yes / (p_yes + p_no); the gap between the mean of that number and the
share of points truly inside is averaged over the bins, weighted by their size. ``points_on_…`` is
the plain accuracy by where a point lies (:mod:`~sam4mllm_tool.evaluation.places`); points off the
target count in none of them where the other objects are not known. ``stated_on`` and
``stated_off``: the share of PPG's points that are where the reply states them to be.

Confidence intervals resample *images*, since expressions on one image are not independent
(percentile cluster bootstrap; Efron & Tibshirani, 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sam4mllm_tool.evaluation.places import PLACES, Place
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.types import Box, Mask

Floats = NDArray[np.float64]
PRECISION_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
ECE_BINS = 10


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


@dataclass(frozen=True)
class Metric:
    """A number computed from sums over expressions.

    Attributes:
        columns: what one outcome adds to each sum.
        value: sums of shape (..., columns) → the metric, NaN where it is not defined.
    """

    name: str
    columns: Callable[[Outcome], Sequence[float]]
    value: Callable[[Floats], Floats]

    def __call__(self, outcomes: Iterable[Outcome]) -> float:
        """The metric over these outcomes, NaN if none of them count."""
        table = [self.columns(outcome) for outcome in outcomes]
        return (
            float(self.value(np.asarray(table, dtype=np.float64).sum(axis=0))) if table else np.nan
        )


def _ratio(sums: Floats) -> Floats:
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _mean_of(
    name: str,
    number: Callable[[Outcome], float],
    among: Callable[[Outcome], bool] = lambda _: True,
) -> Metric:
    """The mean of a number over the outcomes that count."""
    return Metric(name, lambda o: (number(o), 1) if among(o) else (0, 0), _ratio)


def _has_target(outcome: Outcome) -> bool:
    return outcome.has_target


def _precision(level: float) -> Metric:
    return _mean_of(f"pr{round(level * 100)}", lambda o: o.iou >= level, _has_target)


def _point_columns(outcome: Outcome) -> Sequence[float]:
    inside = [p.says_inside for p in outcome.points if p.inside]
    outside = [not p.says_inside for p in outcome.points if not p.inside]
    return sum(inside), len(inside), sum(outside), len(outside)


def _at(place: Place) -> Metric:
    def columns(outcome: Outcome) -> Sequence[float]:
        some = [point.right for point in outcome.points if point.place == place]
        return sum(some), len(some)

    return Metric(f"points_on_{place}", columns, _ratio)


def _stated(on: bool) -> Metric:
    def columns(outcome: Outcome) -> Sequence[float]:
        some = [point.inside == on for point in outcome.stated if point.stated == on]
        return sum(some), len(some)

    return Metric("stated_on" if on else "stated_off", columns, _ratio)


def _balanced(sums: Floats) -> Floats:
    return (_ratio(sums[..., :2]) + _ratio(sums[..., 2:])) / 2


def _plain(sums: Floats) -> Floats:
    return _ratio(np.stack([sums[..., 0] + sums[..., 2], sums[..., 1] + sums[..., 3]], axis=-1))


def _calibration_columns(outcome: Outcome) -> Sequence[float]:
    """Per bin: how far the sum of stated probabilities exceeds the points inside; and the count."""
    gaps = np.zeros(ECE_BINS + 1)
    for point in outcome.points:
        total = point.p_yes + point.p_no
        stated = point.p_yes / total if total > 0 else 0.5
        gaps[min(ECE_BINS - 1, int(stated * ECE_BINS))] += stated - point.inside
    gaps[ECE_BINS] = len(outcome.points)
    return gaps.tolist()


def _ece(sums: Floats) -> Floats:
    gaps = np.abs(sums[..., :ECE_BINS]).sum(axis=-1)
    return _ratio(np.stack([gaps, sums[..., ECE_BINS]], axis=-1))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("cIoU", lambda o: o.counted, _ratio),
        _mean_of("gIoU", lambda o: o.iou),
        _mean_of("mIoU", lambda o: o.iou, _has_target),
        *map(_precision, PRECISION_LEVELS),
        _mean_of("n_acc", lambda o: not o.answered_target, lambda o: not o.has_target),
        _mean_of("t_acc", lambda o: o.answered_target, _has_target),
        _mean_of("box_acc50", lambda o: (o.box_iou or 0) >= 0.5, lambda o: o.box_iou is not None),
        Metric("point_accuracy", _point_columns, _balanced),
        Metric("point_accuracy_plain", _point_columns, _plain),
        *map(_at, PLACES),
        *map(_stated, (True, False)),
        Metric("ece", _calibration_columns, _ece),
        _mean_of("questions", lambda o: o.questions),
        _mean_of("seconds", lambda o: o.seconds),
    )
}


@dataclass(frozen=True)
class Estimate:
    """A metric with its bootstrap confidence interval; ``None`` where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Second minus first of two systems on the same expressions.

    Attributes:
        p_value: two-sided bootstrap p-value of "no difference".
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of images with replacement.

    Attributes:
        draws: number of resamples.
        level: of the percentile interval.
        seed: the same outcomes and seed give the same interval.
    """

    draws: int = 2000
    level: float = 0.95
    seed: int = 0

    @property
    def _quantiles(self) -> tuple[float, float]:
        tail = (1 - self.level) / 2
        return tail, 1 - tail

    def estimate(self, outcomes: Sequence[Outcome], metric: Metric) -> Estimate:
        """The metric with its confidence interval; a single picture gives none."""
        value = metric(outcomes)
        if not np.isfinite(value):
            return Estimate(None)
        if len({outcome.image for outcome in outcomes}) < 2:
            return Estimate(value)
        samples = self._samples(outcomes, metric)
        low, high = np.nanquantile(samples, self._quantiles)
        return Estimate(value, float(low), float(high))

    def compare(
        self, first: Sequence[Outcome], second: Sequence[Outcome], metric: Metric
    ) -> Difference:
        """Paired bootstrap: both systems are judged on the same resampled images.

        Raises:
            ValueError: the two did not answer the same expressions.
        """
        by_case = {outcome.case: outcome for outcome in second}
        if len(by_case) != len(second) or {o.case for o in first} != set(by_case):
            raise ValueError("a paired comparison needs the same expressions on both sides")
        aligned = [by_case[outcome.case] for outcome in first]
        gaps = self._samples(aligned, metric) - self._samples(first, metric)
        low, high = np.nanquantile(gaps, self._quantiles)
        tail = min((gaps <= 0).mean(), (gaps >= 0).mean())
        return Difference(
            metric(aligned) - metric(first), float(low), float(high), float(min(1.0, 2 * tail))
        )

    def _samples(self, outcomes: Sequence[Outcome], metric: Metric) -> Floats:
        """The metric of each resample. Images are numbered in order of appearance, so that two
        calls on aligned outcomes draw the same images.
        """
        numbers = {image: i for i, image in enumerate(dict.fromkeys(o.image for o in outcomes))}
        table = np.array([metric.columns(outcome) for outcome in outcomes], dtype=np.float64)
        sums = np.zeros((len(numbers), table.shape[1]))
        np.add.at(sums, [numbers[outcome.image] for outcome in outcomes], table)
        random = np.random.default_rng(self.seed)
        weights = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), self.draws)
        return metric.value(weights @ sums)


def summarise(
    outcomes: Sequence[Outcome], bootstrap: Bootstrap | None = None
) -> dict[str, Estimate]:
    """Every metric over these outcomes, with confidence intervals."""
    resampler = bootstrap or Bootstrap()
    return {name: resampler.estimate(outcomes, metric) for name, metric in METRICS.items()}


def _united(masks: Sequence[Mask], ignore: Mask | None) -> NDArray[np.bool_] | None:
    if not masks:
        return None
    united: NDArray[np.bool_] = np.logical_or.reduce([mask.pixels for mask in masks])
    return united & ~ignore.pixels if ignore else united
