"""Marks on the picture, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.drawing.marks import DOT, FRAME, LABEL_GROUND, RING, dot_radius, draw_marks
from sam4mllm_tool.pipeline.points import grid_points
from sam4mllm_tool.types import Box, Point, RgbImage


@pytest.fixture
def picture():
    noise = np.random.default_rng(0).integers(20, 200, (320, 480, 3), dtype=np.uint8)
    return RgbImage.from_pil(Image.fromarray(noise))


def within(size, point, radius):
    rows, columns = np.mgrid[: size[1], : size[0]]
    return np.hypot(columns + 0.5 - point.x, rows + 0.5 - point.y) <= radius


def test_a_dot_covers_exactly_the_pixels_around_its_point(picture):
    point = Point(200.5, 100.25)
    before = picture.array.copy()
    marked = draw_marks(picture, [point]).array
    radius = dot_radius(picture.size)
    disc = within(picture.size, point, radius)
    assert np.array_equal((marked == DOT).all(axis=2), disc)
    assert disc.sum() >= 10
    ring = within(picture.size, point, radius + 1) & ~disc
    assert (marked[ring] == RING).all()
    assert np.array_equal(picture.array, before), "the picture itself stays as it was"


def test_nothing_changes_away_from_the_mark_and_its_number(picture):
    marked = draw_marks(picture, [Point(240, 160)]).array
    changed = np.argwhere((marked != picture.array).any(axis=2))
    assert (np.abs(changed - (160, 240)).max(axis=0) < 25).all()


def test_the_frame_lies_around_the_box_and_hides_nothing_in_it(picture):
    box = Box(100, 50, 300, 200)
    marked = draw_marks(picture, [], box).array
    assert np.array_equal(marked[50:200, 100:300], picture.array[50:200, 100:300])
    frame = (marked == FRAME).all(axis=2)
    expected = np.zeros((320, 480), dtype=bool)
    expected[49:201, 99:301] = True
    expected[50:200, 100:300] = False
    assert np.array_equal(frame, expected)


@pytest.mark.parametrize("count", [1, 9, 36])
def test_no_number_hides_a_dot(picture, count):
    points = grid_points(Box(150, 100, 270, 220), count)
    marked = draw_marks(picture, points).array
    for point in points:
        assert (marked[within(picture.size, point, dot_radius(picture.size))] == DOT).all()


def test_numbers_differ_and_stay_inside_the_picture(picture):
    corners = [Point(0, 0), Point(479.9, 0), Point(0, 319.9), Point(479.9, 319.9)]
    marked = draw_marks(picture, corners).array
    grounds = [
        (marked[:40, :40] == LABEL_GROUND).all(axis=2),
        (marked[:40, -40:] == LABEL_GROUND).all(axis=2),
        (marked[-40:, :40] == LABEL_GROUND).all(axis=2),
        (marked[-40:, -40:] == LABEL_GROUND).all(axis=2),
    ]
    assert all(ground.sum() > 20 for ground in grounds)
    alone = [draw_marks(picture, [Point(1, 1)] * (n - 1) + [Point(240, 160)]) for n in (1, 2, 3)]
    patches = [one.array[120:200, 200:280].tobytes() for one in alone]
    assert len(set(patches)) == 3


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (28, 28)])
def test_tiny_pictures_are_marked_too(size):
    marked = draw_marks(
        RgbImage.from_pil(Image.new("RGB", size)), [Point(0.5, 0.5)], Box(0, 0, *size)
    )
    assert marked.size == size
    assert tuple(marked.array[0, 0]) == DOT
