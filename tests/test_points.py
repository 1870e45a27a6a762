"""Candidate points and the confidence filter."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.points import (
    PATTERNS,
    Thresholds,
    candidate_points,
    grid_points,
    jittered_points,
    label_point,
    poisson_disk_points,
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


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from([0.0, 0.07, 0.1, 0.3]))
def test_poisson_points_are_those_of_plain_dart_throwing(seed, count, radius):
    """Each dart is compared with every dart before it, and the generator ends in the same state."""
    kept, rng, ours = [], random.Random(seed), random.Random(seed)
    for _ in range(count * 30):
        if len(kept) < count:
            dart = (rng.random(), rng.random())
            kept += [dart] * all(math.dist(dart, other) >= radius for other in kept)
    points = poisson_disk_points(Box(0, 0, 1, 1), count, ours, radius)
    assert points == [pytest.approx(dart, rel=1e-12) for dart in kept]
    assert ours.getstate() == rng.getstate()


# The figures of the authors' demo, in hundredths of the box; it asks about the first half.
DEMO_SPREAD = [
    (93, 70), (51, 89), (91, 90), (32, 32), (88, 10), (12, 28), (29, 52), (49, 49), (28, 12),
    (59, 60), (9, 48), (52, 29), (31, 92), (68, 13), (73, 73), (69, 53), (48, 9), (19, 18),
    (71, 93), (53, 69), (89, 50), (11, 88), (33, 72), (39, 41), (72, 33), (13, 68), (79, 82),
    (8, 8), (81, 22), (92, 30),
]  # fmt: skip
CENTRES = [(x + 0.5, y + 0.5) for x in range(5) for y in range(5)]
CORNERS = [(x, y) for x in range(1, 5) for y in range(1, 5)]


def _nearest(points):
    """Each point's place among cell centres and corners of a 5 x 5 grid, and how far it is off."""
    places = CENTRES + CORNERS
    near = [min(places, key=lambda place, p=p: math.dist(place, p)) for p in points]
    off = max(
        abs(a - b)
        for p, place in zip(points, near, strict=True)
        for a, b in zip(p, place, strict=True)
    )
    return near, off


def test_jittered_points_spread_as_those_of_the_authors_demo():
    theirs, off = _nearest([(x / 20, y / 20) for x, y in DEMO_SPREAD])
    assert set(theirs[:]) >= set(CENTRES) and len(set(theirs) & set(CORNERS)) == 5
    assert off <= 0.15 + 1e-9
    asked, seen = set(), set()
    for seed in range(60):
        points = jittered_points(BOX, 15, random.Random(seed))
        assert points == jittered_points(BOX, 15, random.Random(seed))
        near, off = _nearest([((x - 10) / 6, (y - 20) / 12) for x, y in points])
        assert len(points) == len(set(near)) == 15 and off <= 0.15 + 1e-9
        assert len(set(near) & set(CORNERS)) <= 5
        asked.add(tuple(points))
        seen |= set(near)
    assert len(asked) == 60 and seen == set(CENTRES) | set(CORNERS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_chosen_by_name(blocks, model, pattern):
    settings = replace(model.settings, candidates=pattern, points=7)
    points = replace(model, settings=settings).candidate_points(BOX, blocks)
    assert points == candidate_points(pattern, BOX, 7)
    assert len(points) == 7
    others = [candidate_points(other, BOX, 7) for other in PATTERNS if other != pattern]
    assert points not in others


def test_a_misspelt_pattern_names_the_nearest_one(blocks, model):
    settings = replace(model.settings, candidates="jitered")
    with pytest.raises(InputError, match="jitered") as error:
        replace(model, settings=settings).candidate_points(BOX, blocks)
    assert "jittered" in error.value.hint


@given(st.integers(1, 60))
def test_any_count_of_jittered_points_lies_inside(count):
    points = jittered_points(BOX, count, random.Random(0))
    assert len(set(points)) == count
    assert all(10 < x < 40 and 20 < y < 80 for x, y in points)


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
