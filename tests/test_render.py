"""Pictures by exact pixels; the page by what it holds."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sam4mllm_tool.drawing.html import trace_page
from sam4mllm_tool.drawing.overlay import (
    CROP_SIDE,
    POINT_COLOURS,
    colour_of,
    mask_layer,
    numbered_view,
    overlay,
    overlay_masks,
)
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Mask, RgbImage


def test_masks_are_tinted_outlined_and_leave_the_rest_alone(blocks, truth):
    red, blue = truth["all blocks"]
    pixels = np.asarray(overlay_masks(blocks, {1: red, 2: blue}))
    assert pixels.shape == blocks.array.shape
    untouched = ~(red.pixels | blue.pixels)
    assert (pixels[untouched] == 255).all()
    inside = np.round((np.array((214, 40, 40)) + colour_of(1)) / 2)
    assert (pixels[35, 150] == inside).all()
    assert (pixels[15, 100] == colour_of(1)).all()  # on the rim
    assert (pixels[100, 10] == colour_of(2)).all()


def test_points_have_the_colour_of_their_answer(blocks, truth):
    points = [
        {"x": 80, "y": 25, "label": "foreground", "p_yes": 0.9, "p_no": 0.1},
        {"x": 110, "y": 35, "label": "background", "p_yes": 0.1, "p_no": 0.9},
        {"x": 170, "y": 30, "label": "undecided", "p_yes": 0.5, "p_no": 0.4},
    ]
    one = {"box": [70, 15, 190, 45], "points": points, "mask": truth["the red block"][0].to_rle()}
    picture = overlay(blocks, [one])
    for point in points:
        assert picture.getpixel((point["x"], point["y"])) == POINT_COLOURS[point["label"]]
    assert picture.getpixel((70, 30)) == colour_of(1)
    assert picture.getpixel((189, 30)) == colour_of(1)


@pytest.mark.parametrize("max_side", [64, 100, 768])
def test_a_view_is_bounded_and_a_crop_shows_the_object(blocks, truth, max_side):
    masks = {2: truth["the blue block"][0]}
    assert max(numbered_view(blocks, masks, max_side=max_side).size) <= max_side
    crop = numbered_view(blocks, masks, crop=True, max_side=max_side)
    assert max(crop.size) <= max_side
    tinted = np.round((np.array((45, 95, 215)) + colour_of(2)) / 2)
    near = np.abs(np.asarray(crop).astype(int) - tinted).max(axis=2) < 20
    assert near.mean() > 0.3


def test_a_small_crop_is_enlarged_within_the_bound(blocks, truth):
    masks = {1: truth["the red block"][0]}
    crop = numbered_view(blocks, masks, crop=True, max_side=768)
    assert max(crop.size) == CROP_SIDE
    pixels = np.asarray(crop).astype(int)  # (56,1)–(200,60) of the picture, 3.1 times
    assert pixels[100, 20].min() >= 250
    tinted = (np.array((214, 40, 40)) + colour_of(1)) / 2
    assert np.abs(pixels[50:130, 150:400] - tinted).max() <= 12  # resampling rings at edges
    assert numbered_view(blocks, masks, max_side=768).size == blocks.size


def test_views_of_nothing_and_of_empty_masks_are_plain(blocks):
    empty = Mask(np.zeros((120, 200), bool))
    for masks in ({}, {1: empty}):
        view = numbered_view(blocks, masks, crop=True)
        assert np.array_equal(np.asarray(view), blocks.array)


def test_a_mask_layer_is_clear_outside(truth):
    layer = np.asarray(mask_layer(truth["the red block"][0], (1, 2, 3)))
    assert layer[0, 0, 3] == 0
    assert tuple(layer[15, 100]) == (1, 2, 3, 255)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.addresses += [v for k, v in attributes if k in {"src", "href", "data", "action"}]
        assert not [k for k, _ in attributes if k.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>'


def test_the_page_needs_no_network_and_escapes_what_was_said(blocks, truth):
    expression = " ".join(HOSTILE.split())
    model = Sam4MLLM(TruthfulMllm({expression: truth["the red block"]}), ColourSegmenter())
    found = model.segment(blocks, HOSTILE, source=HOSTILE)
    page = trace_page(found.trace.page_data(), blocks)
    reader = _Reader()
    reader.feed(page)
    assert reader.scripts == 0
    assert len(reader.addresses) == 2
    assert all(address.startswith("data:image/") for address in reader.addresses)
    assert not re.search(r"url\(|@import", page)
    text = "".join(reader.text)
    assert HOSTILE.split()[0] in text
    assert text.count("Please provide the bounding box") == 1
    assert text.count("[350,125,950,375]") == 2  # the reply once, and round 2's question


def test_a_page_of_nothing_found_says_so(model, blocks):
    from sam4mllm_tool.types import TargetCount

    found = model.segment(blocks, "a zebra", count=TargetCount.ZERO_OR_MORE)
    page = trace_page(found.trace.page_data(), blocks)
    assert "not found" in page
    assert "No object found." in page


def test_huge_pictures_are_shown_smaller(truth):
    from PIL import Image

    image = RgbImage.from_pil(Image.new("RGB", (3000, 2000), "white"))
    mask = np.zeros((2000, 3000), bool)
    mask[500:900, 600:1500] = True
    model = Sam4MLLM(TruthfulMllm({"x": [Mask(mask)]}), ColourSegmenter())
    page = trace_page(model.segment(image, "x").trace.page_data(), image)
    assert len(page) < 400_000
