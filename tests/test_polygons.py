"""Polygons against pycocotools' own rasteriser."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sam4mllm_tool.masks.polygons import mask_to_polygons, polygons_to_mask
from sam4mllm_tool.types import Mask


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_any_mask_comes_back_pixel_for_pixel(width, height, density, seed):
    mask = Mask(np.random.default_rng(seed).random((height, width)) < density)
    assert polygons_to_mask(mask_to_polygons(mask), width, height) == mask


def test_a_ring_is_cut_through_its_hole():
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    polygons = mask_to_polygons(Mask(ring))
    assert len(polygons) >= 2
    assert polygons_to_mask(polygons, 5, 5) == Mask(ring)


def test_a_rectangle_has_four_corners_on_pixel_edges():
    pixels = np.zeros((6, 8), dtype=bool)
    pixels[1:4, 2:7] = True
    (polygon,) = mask_to_polygons(Mask(pixels))
    corners = set(zip(polygon[::2], polygon[1::2], strict=True))
    assert corners == {(2, 1), (7, 1), (7, 4), (2, 4)}
