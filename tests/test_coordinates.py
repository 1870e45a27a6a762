"""An agent's numbers and pixels: both ways, each axis by its own side."""

import math

import pytest

from sam4mllm_tool.errors import PromptError
from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.types import Box, Point

PIXELS = Frame("pixels", 200, 120)
RELATIVE = Frame("relative_1000", 200, 120)


def test_pixels_pass_through():
    assert PIXELS.point_in(3, 110) == Point(3, 110)
    assert PIXELS.point_in(1000, 1000) == Point(1000, 1000)
    assert PIXELS.box_in([1, 2, 30, 400]) == Box(1, 2, 30, 400)
    assert PIXELS.box_out(Box(1.06, 2.04, 30, 40)) == [1.1, 2.0, 30, 40]
    assert PIXELS.length_out(12.34) == 12.3


def test_thousandths_are_of_each_axis_own_side():
    assert RELATIVE.point_in(500, 250) == Point(100, 30)
    assert RELATIVE.box_in([100, 250, 400, 750]) == Box(20, 30, 80, 90)
    assert RELATIVE.point_out(Point(100, 30)) == (500, 250)
    assert RELATIVE.box_out(Box(20, 30, 80, 90)) == [100, 250, 400, 750]
    assert RELATIVE.point_out(Point(1.111, 1.111)) == (5.6, 9.3)


@pytest.mark.parametrize("size", [(200, 120), (120, 200)])
def test_a_length_is_in_thousandths_of_the_longer_side(size):
    assert Frame("relative_1000", *size).length_out(50) == 250


def test_the_far_edge_of_a_relative_frame_is_the_last_pixel():
    corner = RELATIVE.point_in(1000, 1000)
    assert 199.9 < corner.x < 200 and 119.9 < corner.y < 120
    assert RELATIVE.point_in(1000, 500) == (math.nextafter(200, 0), 60)
    assert RELATIVE.point_in(500, 1000) == (100, math.nextafter(120, 0))
    assert RELATIVE.point_in(1001, 1001).x > 200  # beyond the edge is not moved inside


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ([0, 0, math.nan, 1], "not finite"),
        ([0, -math.inf, 1, 1], "not finite"),
        ([10, 20, 10, 30], "no area"),
        ([10, 20, 30, 20], "no area"),
        ([30, 20, 10, 40], "no area"),
        ([10, 40, 30, 20], "no area"),
    ],
)
@pytest.mark.parametrize("frame", [PIXELS, RELATIVE], ids=["pixels", "relative"])
def test_boxes_without_area_are_refused_with_a_hint(frame, numbers, complaint):
    with pytest.raises(PromptError, match=complaint) as caught:
        frame.box_in(numbers)
    assert caught.value.hint


def test_the_description_names_the_unit():
    assert "pixels of the upright image" in Frame.describe("pixels")
    assert "thousandths" in Frame.describe("relative_1000")
