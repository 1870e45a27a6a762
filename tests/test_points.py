"""Candidate points and the confidence filter."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam4mllm_tool.pipeline.points import (
    Thresholds,
    grid_points,
    label_point,
    poisson_disk_points,
    uncertain_points,
)
from sam4mllm_tool.types import Box, PointLabel, YesNo

BOX = Box(10, 20, 40, 80)


def test_nine_points_are_the_cell_centres_of_a_three_by_three_grid():
    assert grid_points(BOX, 9) == [(x, y) for y in (30, 50, 70) for x in (15, 25, 35)]


@given(st.integers(1, 60))
def test_any_count_gives_that_many_different_points_inside(count):
    points = grid_points(BOX, count)
    assert len(set(points)) == len(points) == count
    assert all(10 < x < 40 and 20 < y < 80 for x, y in points)


def test_poisson_points_keep_their_distance_and_repeat_by_seed():
    points = poisson_disk_points(BOX, 100, random.Random(3))
    assert points == poisson_disk_points(BOX, 100, random.Random(3))
    unit = [((x - 10) / 30, (y - 20) / 60) for x, y in points]
    gaps = [math.dist(a, b) for i, a in enumerate(unit) for b in unit[:i]]
    assert len(points) > 30
    assert min(gaps) >= 0.1


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (YesNo(0.05, 0.91), PointLabel.BACKGROUND),
        (YesNo(0.1, 0.9), PointLabel.UNDECIDED),  # "above" 0.9, not "at"
        (YesNo(0.76, 0.2), PointLabel.FOREGROUND),
        (YesNo(0.75, 0.2), PointLabel.UNDECIDED),
        (YesNo(0.5, 0.5), PointLabel.UNDECIDED),
        (YesNo(0.01, 0.01), PointLabel.UNDECIDED),  # the model said something else altogether
    ],
)
def test_only_sure_answers_count(answer, label):
    assert label_point(answer, Thresholds()) is label


def test_uncertain_points_are_the_peaks_and_keep_apart():
    doubt = np.zeros((50, 60), dtype=np.float32)
    doubt[30, 20], doubt[30, 22], doubt[10, 50], doubt[45, 45] = 0.9, 0.8, 0.7, 0.95
    points = uncertain_points(doubt, Box(0, 0, 60, 44), 5, spacing=5)
    # (45,45) lies below the box, (22,30) too near to the first peak
    assert points == [(20.5, 30.5), (50.5, 10.5)]
