"""Metrics on cases worked by hand, and the bootstrap against exact resampling."""

import json
import math

import numpy as np
import pytest

from sam4mllm_tool.evaluation.bootstrap import Bootstrap, summarise
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import (
    Outcome,
    PointOutcome,
    StatedPoint,
    compare_masks,
    match_boxes,
)
from sam4mllm_tool.evaluation.places import Places
from sam4mllm_tool.types import Box, Mask


def outcome(case, intersection, truth, predicted, **more):
    return Outcome(str(case), more.pop("image", str(case)), intersection, truth, predicted, **more)


def rectangle(x0, y0, x1, y1):
    pixels = np.zeros((60, 80), dtype=bool)
    pixels[y0:y1, x0:x1] = True
    return Mask(pixels)


HAND_WORKED = [
    outcome(1, 50, 100, 50),  # IoU 0.5: half of the object found
    outcome(2, 900, 1000, 900),  # IoU 0.9
    outcome(3, 0, 200, 0),  # a target, but nothing predicted: IoU 0, union 200
    outcome(4, 0, 0, 0),  # no target, nothing predicted: a right refusal
    outcome(5, 0, 0, 300),  # no target, false alarm: its area joins the union
]


def value(name, outcomes=HAND_WORKED):
    return METRICS[name](outcomes)


def test_hand_worked_masks():
    # sums: intersections 50 + 900; unions 100 + 1000 + 200 + 0 + 300
    assert value("cIoU") == pytest.approx(950 / 1600)
    assert value("gIoU") == pytest.approx((0.5 + 0.9 + 0 + 1 + 0) / 5)
    assert value("mIoU") == pytest.approx((0.5 + 0.9 + 0) / 3)
    assert value("pr50") == pytest.approx(2 / 3), "an IoU of exactly 0.5 counts"
    assert value("pr60") == pytest.approx(1 / 3)
    assert value("pr90") == pytest.approx(1 / 3)
    assert value("n_acc") == 1 / 2
    assert value("t_acc") == pytest.approx(2 / 3)


def test_giou_and_miou_agree_without_no_target_expressions():
    targets = HAND_WORKED[:3]
    assert value("gIoU", targets) == value("mIoU", targets)


def test_what_is_not_defined_is_nan_and_none_in_a_summary():
    assert math.isnan(value("n_acc", HAND_WORKED[:3]))
    assert math.isnan(value("t_acc", HAND_WORKED[3:]))
    assert math.isnan(value("cIoU", []))
    assert math.isnan(value("cIoU", [HAND_WORKED[3]])), "only right refusals: 0/0"
    summary = summarise(HAND_WORKED[:3], Bootstrap(draws=50))
    assert summary["n_acc"].value is None
    assert summary["point_accuracy"].value is None
    json.dumps({name: vars(estimate) for name, estimate in summary.items()}, allow_nan=False)


def test_boxes():
    one, half, far = Box(0, 0, 10, 10), Box(5, 0, 15, 10), Box(50, 50, 60, 60)
    assert match_boxes([one], [half]) == pytest.approx(50 / 150)
    assert match_boxes([], [one]) == 0
    assert match_boxes([one], []) is None
    assert match_boxes([far, one], [one, far]) == 1, "whatever the order"
    assert match_boxes([half, far], [far, one]) == pytest.approx(50 / 150), "the worst pair"
    assert match_boxes([one, one], [one]) == 0, "one too many"
    cases = [
        outcome(1, 1, 1, 1, box_iou=0.5),
        outcome(2, 1, 1, 1, box_iou=0.49),
        outcome(3, 0, 1, 0, box_iou=0.0),
        outcome(4, 0, 0, 9, box_iou=None),
    ]
    assert value("box_acc50", cases) == pytest.approx(1 / 3)


def test_balanced_accuracy_does_not_reward_always_yes():
    yes = [PointOutcome(0.9, 0.1, inside) for inside in [True] * 9 + [False]]
    cases = [outcome(1, 1, 1, 1, points=tuple(yes))]
    assert value("point_accuracy_plain", cases) == pytest.approx(0.9)
    assert value("point_accuracy", cases) == pytest.approx(0.5)


def test_point_accuracy_weighs_points_over_all_expressions():
    cases = [
        outcome(1, 1, 1, 1, points=(PointOutcome(0.8, 0.2, True), PointOutcome(0.4, 0.6, True))),
        outcome(2, 1, 1, 1, points=(PointOutcome(0.1, 0.9, False), PointOutcome(0.7, 0.2, False),
                                    PointOutcome(0.2, 0.3, False))),
    ]  # fmt: skip
    assert value("point_accuracy", cases) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert value("point_accuracy_plain", cases) == pytest.approx(3 / 5)


def test_calibration_by_hand():
    # Bin 0.9–1.0: two points at 0.95, one inside: gap |1.9 - 1|. Bin 0.2–0.3: 0.25, outside.
    points = (
        PointOutcome(0.95, 0.05, True),
        PointOutcome(0.475, 0.025, False),  # normalised: 0.95
        PointOutcome(0.25, 0.75, False),
    )
    assert value("ece", [outcome(1, 1, 1, 1, points=points)]) == pytest.approx((0.9 + 0.25) / 3)
    split = [outcome(i, 1, 1, 1, points=(point,)) for i, point in enumerate(points)]
    assert value("ece", split) == pytest.approx((0.9 + 0.25) / 3), "bins are filled over all cases"
    certain = (PointOutcome(1.0, 0.0, True), PointOutcome(0.0, 1.0, False))
    assert value("ece", [outcome(1, 1, 1, 1, points=certain)]) == 0
    unknown = (PointOutcome(0.0, 0.0, True),)
    assert value("ece", [outcome(1, 1, 1, 1, points=unknown)]) == pytest.approx(0.5)


def test_masks_of_several_objects_are_united():
    a, b = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    a[:, :2], b[:, 1:3] = True, True
    truth = np.zeros((4, 6), bool)
    truth[:, :3] = True
    assert compare_masks([Mask(a), Mask(b)], [Mask(truth)]) == (12, 12, 12)
    assert compare_masks([], [Mask(truth)]) == (0, 12, 0)
    assert compare_masks([Mask(a)], []) == (0, 0, 8)
    assert compare_masks([], []) == (0, 0, 0)
    assert compare_masks([Mask(a), Mask(b)], [Mask(truth)], ignore=Mask(a)) == (4, 4, 4)
    with pytest.raises(ValueError, match="shape"):
        compare_masks([Mask(a)], [Mask(truth[:2])])


def test_the_bootstrap_interval_of_a_mean_is_the_textbook_one():
    rng = np.random.default_rng(1)
    ious = rng.integers(0, 101, 400)
    cases = [outcome(i, int(v), 100, int(v)) for i, v in enumerate(ious)]
    estimate = Bootstrap(draws=4000).estimate(cases, METRICS["gIoU"])
    error = 1.96 * (ious / 100).std() / math.sqrt(400)
    assert estimate.value == pytest.approx((ious / 100).mean())
    assert estimate.low == pytest.approx(estimate.value - error, abs=0.15 * error)
    assert estimate.high == pytest.approx(estimate.value + error, abs=0.15 * error)


def test_images_not_expressions_are_resampled():
    # Ten equal expressions on each image: the interval must be that of 40 images, not 400 cases.
    rng = np.random.default_rng(2)
    ious = rng.integers(0, 101, 40)
    alone = [outcome(i, int(v), 100, int(v)) for i, v in enumerate(ious)]
    tenfold = [
        outcome(f"{i}-{n}", int(v), 100, int(v), image=str(i))
        for i, v in enumerate(ious)
        for n in range(10)
    ]
    one, ten = (Bootstrap().estimate(cases, METRICS["cIoU"]) for cases in (alone, tenfold))
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high))


def test_a_paired_comparison_sees_a_small_but_constant_difference():
    rng = np.random.default_rng(3)
    ious = rng.integers(0, 90, 200)
    first = [outcome(i, int(v), 100, int(v)) for i, v in enumerate(ious)]
    second = [outcome(i, int(v) + 2, 100, int(v) + 2) for i, v in enumerate(ious)][::-1]
    gap = Bootstrap().compare(first, second, METRICS["gIoU"])
    assert gap.value == pytest.approx(0.02)
    assert (gap.low, gap.high) == pytest.approx((0.02, 0.02))
    assert gap.p_value == 0
    same = Bootstrap().compare(first, first, METRICS["gIoU"])
    assert (same.value, same.p_value) == (0, 1)
    with pytest.raises(ValueError, match="same expressions"):
        Bootstrap().compare(first, second[1:], METRICS["gIoU"])


def test_presence_is_judged_by_its_own_question_where_there_is_one():
    assert value("t_acc", [outcome(1, 5, 9, 5, said_target=False)]) == 0
    assert value("n_acc", [outcome(1, 0, 0, 5, said_target=False)]) == 1


def test_outcomes_survive_json():
    case = outcome(
        1, 5, 10, 7, box_iou=0.25, points=(PointOutcome(0.5, 0.25, True),), kind="colour"
    )
    assert Outcome.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_places_of_points_on_a_picture_drawn_by_hand():
    # The target is 40 x 20 pixels: near its outline is closer than 0.03 * sqrt(800) = 0.85 px.
    target, other = rectangle(10, 20, 50, 40), rectangle(50, 20, 70, 30)
    places = Places([target], [other])
    assert places.of(30.5, 30.5) == "target"
    assert places.of(12.5, 22.5) == "target"
    assert places.of(60.5, 25.5) == "other"
    assert places.of(60.5, 35.5) == "background", "right of the target, below the other object"
    assert places.of(25.5, 60.5) == "background", "below the picture's last row"
    assert places.of(10.5, 30.5) == "outline", "the target's first column"
    assert places.of(50.5, 25.5) == "outline", "of the two objects' border neither side counts"
    assert places.of(12.5, 19.5) == "outline"
    assert places.of(12.5, 18.5) == "background"
    unknown = Places([target], None)
    assert unknown.of(60.5, 25.5) is None, "nobody knows what lies there"
    assert unknown.of(30.5, 30.5) == "target"
    both = Places([target, other], [])
    assert both.of(60.5, 25.5) == "target", "several targets are one region"
    assert both.of(49.5, 25.5) == "target", "and have no outline between them"


def test_accuracy_by_where_points_lie():
    def point(yes, inside, place):
        return PointOutcome(yes, 1 - yes, inside, place=place)

    cases = [
        outcome(1, 1, 1, 1, points=(
            point(0.9, True, "target"), point(0.2, True, "target"), point(0.7, True, "target"),
            point(0.8, False, "other"), point(0.1, False, "background"),
        )),
        outcome(2, 1, 1, 1, points=(
            point(0.3, False, "other"), point(0.6, True, "outline"), point(0.9, False, None),
        )),
        outcome(3, 0, 1, 0),
    ]  # fmt: skip
    assert value("points_on_target", cases) == pytest.approx(2 / 3)
    assert value("points_on_other", cases) == pytest.approx(1 / 2)
    assert value("points_on_background", cases) == 1
    assert value("points_on_outline", cases) == 1
    assert math.isnan(value("points_on_other", cases[2:]))
    assert [Outcome.from_json(json.loads(json.dumps(c.to_json()))) for c in cases] == cases


def test_stated_points_are_judged_apart():
    stated = (StatedPoint(True, True), StatedPoint(True, False), StatedPoint(True, True),
              StatedPoint(False, False))  # fmt: skip
    cases = [outcome(1, 1, 1, 1, stated=stated), outcome(2, 1, 1, 1)]
    assert value("stated_on", cases) == pytest.approx(2 / 3)
    assert value("stated_off", cases) == 1
    assert math.isnan(value("point_accuracy", cases)), "they are no answers"
    assert [Outcome.from_json(json.loads(json.dumps(c.to_json()))) for c in cases] == cases
