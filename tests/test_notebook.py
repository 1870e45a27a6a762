"""Results as a notebook shows them, and the tutorial run from its first cell to its last."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam4mllm_tool.display import MAX_SIDE
from sam4mllm_tool.drawing.overlay import colour_of, small_overlay
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.formats import FORMATS, describe_numbers
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Location, Settings
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Box, Mask, RgbImage, TargetCount


def shown(html: str) -> Image.Image:
    """The picture in a cell's output."""
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def near(pixel, colour) -> bool:
    return bool(np.abs(np.array(pixel, int) - np.array(colour)).max() < 40)


def test_a_segmentation_shows_mask_numbers_and_the_folded_dialogue(model, blocks, truth):
    found = model.segment(blocks, "the red block")
    html = found._repr_html_()
    picture = shown(html)
    assert picture.size == blocks.size
    tinted = (np.array((214, 40, 40)) + colour_of(1)) / 2
    assert near(picture.getpixel((150, 35)), tinted)
    assert near(picture.getpixel((100, 100)), (255, 255, 255))
    assert "70, 15, 190, 45" in html
    assert html.index("<details>") < html.index("Please provide the bounding box")
    assert "thousandths of the picture" in html
    png = Image.open(io.BytesIO(found._repr_png_()))
    assert near(png.getpixel((150, 35)), tinted)
    assert np.array_equal(np.asarray(found.to_pil()), np.asarray(found.objects[0].to_pil()))


def test_objects_locations_traces_and_masks_show_themselves(model, blocks, truth):
    found = model.segment(blocks, "all blocks", count="1+")
    second = found.objects[1]
    assert near(shown(second._repr_html_()).getpixel((10, 100)), colour_of(1))
    located = model.locate(blocks, "the blue block")
    assert near(shown(located._repr_html_()).getpixel((10, 80)), colour_of(1))
    assert located.to_pil().getpixel((10, 80)) == colour_of(1)
    trace = shown(found.trace._repr_html_())  # it holds no picture
    assert near(trace.getpixel((100, 100)), (128, 128, 128))
    assert not near(trace.getpixel((170, 40)), (128, 128, 128))
    mask = Image.open(io.BytesIO(second.mask._repr_png_()))
    assert np.array_equal(np.asarray(mask) == 255, truth["the blue block"][0].pixels)
    assert Image.open(io.BytesIO(blocks._repr_jpeg_())).size == blocks.size


def test_not_found_is_shown_too(model, blocks):
    html = model.segment(blocks, "a <b>zebra</b>", count=TargetCount.ZERO_OR_MORE)._repr_html_()
    assert "not found" in html
    assert "<b>zebra" not in html


def test_a_value_without_its_picture_says_so():
    bare = Location("x", TargetCount.ONE, (), ())
    assert "not found" in bare._repr_html_()
    with pytest.raises(InputError):
        bare.to_pil()


def test_large_pictures_are_shown_small_and_in_proportion():
    pixels = np.full((600, 1600, 3), 255, np.uint8)
    pixels[120:360, 800:1440] = (214, 40, 40)
    image = RgbImage.from_pil(Image.fromarray(pixels))
    mask = Mask((pixels == (214, 40, 40)).all(axis=2))
    model = Sam4MLLM(TruthfulMllm({"x": [mask]}), ColourSegmenter(), Settings("box_only"))
    html = model.segment(image, "x")._repr_html_()
    assert len(html) < 100_000
    picture = shown(html)
    assert picture.size == (MAX_SIDE, 240)
    assert near(picture.getpixel((320 + 1, 50)), colour_of(1))  # (800, 125): the box's left side
    assert near(picture.getpixel((300, 100)), (255, 255, 255))


def test_a_picture_already_small_takes_the_numbers_of_the_large_one():
    small = Image.new("RGB", (100, 50), "white")
    one = {"box": [400, 100, 800, 300], "points": [], "score": None}
    drawn = small_overlay(small, (1000, 500), [one], 100)
    assert drawn.size == (100, 50)
    assert drawn.getpixel((40, 20)) == colour_of(1)
    assert drawn.getpixel((20, 40)) == (255, 255, 255)


def test_other_libraries_values_are_methods(model, blocks, truth):
    found = model.segment(blocks, "all blocks", count="1+", source="blocks.png")
    document = found.to_coco()
    assert [one["area"] for one in document["annotations"]] == [3600, 2400]
    assert document["images"][0]["file_name"] == "blocks.png"
    blue = found.objects[1].to_coco("blocks.png")
    assert blue["images"] == document["images"] and blue["categories"] == document["categories"]
    (of_blue,) = blue["annotations"]
    assert of_blue["bbox"] == [10, 54, 40, 60]
    polygons = found.objects[1].to_coco(polygons=True)["annotations"][0]["segmentation"]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, 120, 200))
    assert np.array_equal(coco_mask.decode(rle).astype(bool), truth["the blue block"][0].pixels)
    supervision = pytest.importorskip("supervision")
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert np.array_equal(detections.mask, [m.pixels for m in truth["all blocks"]])
    alone = found.objects[1].to_supervision()
    assert alone.xyxy.tolist() == [[10, 54, 50, 114]]
    assert alone["class_name"].tolist() == ["all blocks"]


def test_everything_shows_itself_in_the_viewer(model, blocks, monkeypatch):
    """Outside of a notebook; large pictures are shown small."""
    seen: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: seen.append(picture))
    found = model.segment(blocks, "the blue block")
    for value in (found, found.objects[0], found.location, found.objects[0].mask):
        value.show()
    found.trace.show(blocks)
    found.trace.show()
    assert [one.size for one in seen] == [blocks.size] * 6
    assert np.array_equal(np.asarray(seen[0]), np.asarray(seen[4]))
    assert near(seen[5].getpixel((190, 10)), (128, 128, 128))


def test_the_workspace_keeps_no_second_hold_on_a_picture(model, blocks_file):
    """What is bounded by bytes must not be held by a dialogue beside it."""
    box = Toolbox(model)
    box.call("segment_object", {"image": str(blocks_file), "expression": "the red block"})
    box.call("locate_object", {"image": str(blocks_file), "expression": "the red block"})
    assert all(one.location.image is None for one in box.workspace.objects())


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_dialogues_numbers_are_is_what_the_format_writes(name):
    """The far corner lies at three eighths of the width and seven of the height."""
    size = (1120, 560)
    written = FORMATS[name].write_boxes([Box(0, 0, 420, 490)], size)
    numbers = {round(float(number)) for number in re.findall(r"\d+\.?\d*", written)}
    stated = {
        "thousandths": {375, 875},
        "pixels": {420, 490},  # nothing is resized at this size
        "parts in 1024": {384, 896},
        "percent": {38, 88},
    }
    (unit,) = [unit for unit in stated if describe_numbers(name).startswith(unit)]
    assert {number + off for number in numbers for off in (-1, 0, 1)} >= stated[unit]


@pytest.mark.shipped
def test_the_tutorial_runs(tmp_path):
    """As its reader runs it, in a kernel of its own; what it prints is what is committed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    before = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    after = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    # Weights and threads may move a pixel; what was found may not change.
    assert [re.sub(r"[\d.]+", "#", text) for text in after] == [
        re.sub(r"[\d.]+", "#", text) for text in before
    ]


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
