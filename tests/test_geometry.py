"""Arithmetic of boxes and masks, against pycocotools, SciPy and figures worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from scipy import ndimage

from sam4mllm_tool.geometry import box_iou, clip_box, from_grid, intersection, to_grid, union_box
from sam4mllm_tool.masks.relations import (
    centroid,
    combine,
    mask_distance,
    mask_iou,
    relative_position,
    share_inside,
)
from sam4mllm_tool.types import Box, Mask

side = st.floats(-50, 150)


@st.composite
def boxes(draw):
    x, y = sorted((draw(side), draw(side))), sorted((draw(side), draw(side)))
    return Box(x[0], y[0], x[1], y[1])


@st.composite
def masks(draw):
    """Masks of 13×7 pixels, of every density."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Mask(rng.random((7, 13)) < draw(st.sampled_from([0.0, 0.03, 0.3, 0.8, 1.0])))


def block(x_min, y_min, x_max, y_max, size=(60, 40)):
    """A mask of that size (width, height) with one filled rectangle."""
    pixels = np.zeros(size[::-1], bool)
    pixels[y_min:y_max, x_min:x_max] = True
    return Mask(pixels)


# -- grids and boxes -------------------------------------------------------------------------------


def test_grid_numbers_are_cells_of_the_side_and_stay_on_it():
    assert [to_grid(v, 640) for v in (-3, 0, 0.63, 0.65, 320, 639.9, 640, 9999)] == [
        0, 0, 0, 1, 500, 999, 999, 999,
    ]  # fmt: skip
    assert [to_grid(v, 8, 4) for v in (1.99, 2, 7.9, 8)] == [0, 1, 3, 3]
    assert from_grid(0, 640) == pytest.approx(0.32)
    assert from_grid(999, 640) == pytest.approx(639.68)
    assert from_grid(1, 8, 4) == pytest.approx(3)


@given(st.integers(0, 999), st.integers(1, 5000))
def test_a_grid_number_is_read_back_from_the_middle_of_its_cell(number, length):
    assert to_grid(from_grid(number, length), length) == number


def test_each_side_of_a_box_is_clipped_by_its_own_border():
    assert clip_box(Box(-1, -2, 300, 400), 200, 120) == Box(0, 0, 200, 120)
    assert clip_box(Box(3, 4, 5, 6), 200, 120) == Box(3, 4, 5, 6)
    assert clip_box(Box(150, 130, 210, 140), 200, 120) == Box(150, 120, 200, 120)
    assert clip_box(Box(230, 30, 240, 50), 200, 120) == Box(200, 30, 200, 50)
    assert clip_box(Box(-40, -30, -20, -10), 200, 120) == Box(0, 0, 0, 0)


@given(boxes(), boxes())
def test_overlaps_are_those_of_pycocotools(a, b):
    given, other = ([v.x_min, v.y_min, v.width, v.height] for v in (a, b))
    if max(a.area, b.area) > 0.01:  # pycocotools divides by the union
        theirs = coco_mask.iou(np.array([given]), np.array([other]), [0])[0, 0]
        assert box_iou(a, b) == pytest.approx(theirs, abs=1e-9)
    shared = intersection(a, b)
    assert (shared is None) == (box_iou(a, b) == 0) or shared.area < 1e-9
    assert shared == intersection(b, a)


def test_boxes_that_only_touch_do_not_overlap():
    box = Box(10, 20, 40, 30)
    assert intersection(box, Box(40, 20, 50, 30)) is None
    assert intersection(box, Box(10, 30, 40, 50)) is None
    assert intersection(box, Box(39.5, 29, 50, 60)) == Box(39.5, 29, 40, 30)
    assert box_iou(box, Box(39.5, 29, 50, 60)) == pytest.approx(0.5 / (300 + 325.5 - 0.5))
    assert box_iou(Box(1, 1, 1, 1), Box(1, 1, 1, 1)) == 0


def test_a_union_box_takes_each_extreme_from_any_box():
    assert union_box([Box(5, 2, 9, 3), Box(4, 6, 8, 7), Box(6, 1, 7, 4)]) == Box(4, 1, 9, 7)
    assert union_box(iter([Box(5, 2, 9, 3)])) == Box(5, 2, 9, 3)


# -- masks of one image ----------------------------------------------------------------------------


@given(masks(), masks())
def test_shares_are_those_of_pycocotools(a, b):
    rles = [coco_mask.encode(np.asfortranarray(m.pixels.astype(np.uint8))) for m in (a, b)]
    if a.area or b.area:
        theirs = coco_mask.iou([rles[0]], [rles[1]], [0])[0, 0]
        assert mask_iou(a, b) == pytest.approx(theirs)
    if a.area:
        # With a crowd as truth, pycocotools divides by the area of the detection.
        theirs = coco_mask.iou([rles[0]], [rles[1]], [1])[0, 0]
        assert share_inside(a, b) == pytest.approx(theirs)


def test_empty_masks_are_equal_and_cover_nothing():
    empty, some = block(0, 0, 0, 0), block(3, 4, 10, 6)
    assert mask_iou(empty, empty) == 1
    assert mask_iou(empty, some) == share_inside(empty, some) == share_inside(some, empty) == 0
    assert centroid(empty) is None
    assert mask_distance(empty, some) == mask_distance(some, empty) == math.inf
    assert relative_position(empty, some) == relative_position(some, empty) == []


@given(masks())
def test_centroids_are_scipys(mask):
    if mask.area:
        row, column = ndimage.center_of_mass(mask.pixels)
        assert centroid(mask) == pytest.approx((column + 0.5, row + 0.5))


@given(masks(), masks())
def test_distances_are_those_of_scipys_distance_transform(a, b):
    if not (a.area and b.area):
        return
    between_centres = ndimage.distance_transform_edt(~b.pixels)[a.pixels].min()
    assert mask_distance(a, b) == pytest.approx(max(0.0, between_centres - 1))


def test_a_gap_is_counted_between_edges():
    red = block(10, 5, 20, 9)
    assert mask_distance(red, block(20, 5, 30, 9)) == 0  # side by side
    assert mask_distance(red, block(23, 5, 30, 9)) == 3
    assert mask_distance(red, block(10, 14, 20, 16)) == 5
    assert mask_distance(red, block(24, 13, 30, 16)) == pytest.approx(math.hypot(5, 5) - 1)


@pytest.mark.parametrize(
    ("other", "sides"),
    [
        # a is 20 wide and 10 high, b 30 wide and 8 high: clear is more than 2.5 and .9 pixels.
        ((10, 6, 40, 14), ["left_of"]),  # centroids 5 and 0 apart
        ((7, 6, 37, 14), []),  # 2 and 0
        ((8, 6, 38, 14), ["left_of"]),  # 3 and 0
        ((2, 6, 32, 14), ["right_of"]),  # -3 and 0
        ((5, 7, 35, 15), ["above"]),  # 0 and 1
        ((5, 5, 35, 13), ["below"]),  # 0 and -1
        ((20, 20, 50, 28), ["left_of", "above"]),
    ],
)
def test_positions_are_named_where_centroids_differ_by_a_tenth_of_the_extent(other, sides):
    a, b = block(10, 5, 30, 15), block(*other)
    overlaps = bool((a.pixels & b.pixels).any())
    assert relative_position(a, b) == [*sides, *(["overlapping"] if overlaps else [])]


def test_a_difference_of_exactly_a_tenth_is_not_clear():
    # Both 20×10: a tenth of the mean extent is 2 across and 1 down.
    a = block(10, 5, 30, 15)
    assert relative_position(a, block(12, 5, 32, 15)) == ["overlapping"]
    assert relative_position(a, block(10, 6, 30, 16)) == ["overlapping"]
    assert relative_position(a, block(13, 7, 33, 17)) == ["left_of", "above", "overlapping"]


def test_masks_are_combined_pixel_by_pixel_and_stay_as_they_were():
    a, b, c = block(0, 0, 20, 10), block(15, 5, 30, 20), block(18, 0, 25, 8)
    before = a.pixels.copy()
    assert combine("union", [a, b, c]) == Mask(a.pixels | b.pixels | c.pixels)
    assert combine("intersect", [a, b, c]) == block(18, 5, 20, 8)
    assert combine("subtract", [a, b, c]).area == 200 - 25 - 16 + 6
    assert combine("subtract", [a, a]).area == 0
    assert np.array_equal(a.pixels, before)
