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

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.places import PLACES, Place

Floats = NDArray[np.float64]
PRECISION_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
ECE_BINS = 10


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
