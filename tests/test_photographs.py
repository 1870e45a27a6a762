"""Photographs: large, lying on their side, in 16 bits or for print, through everything.

The models are stand-ins that find the red block of any picture: what is tested is that sizes and
coordinates are those of the upright picture wherever they come out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mcp import Client
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from test_integration_mcp import over_http
from typer.testing import CliRunner

from sam4mllm_tool.cli import app
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace
from sam4mllm_tool.types import Mask

RED, GREY = (205, 30, 40), (200, 200, 205)
ORIENTATION = 0x0112
LYING = 6
"""EXIF: the stored picture is to be turned clockwise by a quarter."""


@dataclass(frozen=True)
class Photograph:
    """A file, and where the block lies in the upright picture: left, top, right, bottom."""

    path: Path
    size: tuple[int, int]
    block: tuple[int, int, int, int]

    @property
    def pixels(self) -> np.ndarray:
        mask = np.zeros(self.size[::-1], bool)
        left, top, right, bottom = self.block
        mask[top:bottom, left:right] = True
        return mask

    @property
    def model(self) -> Sam4MLLM:
        truth = {"the red block": [Mask(self.pixels)]}
        return Sam4MLLM(TruthfulMllm(truth), ColourSegmenter())


def upright(size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Grey with a red block in the upper left; edges on multiples of 16, where JPEG keeps them."""
    width, height = size
    block = tuple(16 * round(side / 16) for side in
                  (width * 0.1, height * 0.2, width * 0.5, height * 0.35))  # fmt: skip
    picture = Image.new("RGB", size, GREY)
    ImageDraw.Draw(picture).rectangle((block[0], block[1], block[2] - 1, block[3] - 1), fill=RED)
    return picture, block


def lying(picture: Image.Image, path: Path, **options: object) -> None:
    """Stored turned, with the tag that turns it back."""
    exif = Image.Exif()
    exif[ORIENTATION] = LYING
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, **options)


def write(kind: str, folder: Path) -> Photograph:
    path, size = folder / "photo.jpg", (3008, 4000)  # 12 megapixels
    picture, block = upright(size)
    match kind:
        case "lying JPEG":
            lying(picture, path, quality=92, subsampling=0)
        case "CMYK JPEG":
            lying(picture.convert("CMYK"), path, quality=92, subsampling=0)
        case "16-bit TIFF":
            path, size = folder / "photo.tif", (1504, 2000)
            picture, block = upright(size)
            grey = np.where(np.asarray(picture)[..., 1] < 100, 9000, 52000).astype(np.uint16)
            turned = Image.fromarray(np.rot90(grey).copy())
            turned.save(path, tiffinfo={ORIENTATION: LYING})
    return Photograph(path, size, block)


KINDS = ("lying JPEG", "CMYK JPEG", "16-bit TIFF")


@pytest.fixture(params=KINDS)
def photograph(request, tmp_path) -> Photograph:
    return write(request.param, tmp_path)


@pytest.fixture
def lying_jpeg(tmp_path) -> Photograph:
    return write("lying JPEG", tmp_path)


def test_a_photograph_is_read_upright(photograph):
    loaded = load_image(photograph.path)
    assert loaded.image.size == photograph.size
    if photograph.path.suffix == ".jpg":  # Pillow turns TIFF by itself
        assert any("upright" in note for note in loaded.notes)
    pixels = loaded.image.array.astype(int)
    left, top, right, bottom = photograph.block
    inside = pixels[top + 8 : bottom - 8, left + 8 : right - 8]
    assert np.ptp(inside, axis=(0, 1)).max() <= 6
    assert np.abs(pixels[: top - 8] - pixels[-1, -1]).max() <= 6
    assert np.abs(inside.mean(axis=(0, 1)) - pixels[-1, -1]).max() > 100
    mode = Image.open(photograph.path).mode
    said = {"RGB": "", "CMYK": "CMYK", "I;16": "16-bit"}[mode]
    assert any(said in note for note in loaded.notes)


def test_pipeline_and_overlay_answer_in_pixels_of_the_upright_picture(photograph):
    found = photograph.model.segment(photograph.path, "the red block")
    (one,) = found.objects
    left, top, right, bottom = photograph.block
    # Thousandths of 4000 pixels are 4 pixels; the colour decides within the box.
    assert np.abs(np.array(one.located.box) - photograph.block).max() <= 4
    assert (one.mask.width, one.mask.height) == photograph.size
    assert np.logical_xor(one.mask.pixels, photograph.pixels).sum() < 0.02 * one.mask.area
    drawn = found.to_pil()
    assert drawn.size == photograph.size
    assert drawn.getpixel((10, 10)) == found.image.pil.getpixel((10, 10))
    middle = ((left + right) // 2, top + (bottom - top) // 6)
    assert drawn.getpixel(middle) != found.image.pil.getpixel(middle)


def test_tools_view_and_save_a_photograph_upright(lying_jpeg, tmp_path):
    out = tmp_path / "out"
    box = Toolbox(
        lying_jpeg.model,
        workspace=Workspace(ImagePolicy(allowed_dirs=(tmp_path,), output_dirs=(out,))),
    )
    found = box.call(
        "segment_object", {"image": str(lying_jpeg.path), "expression": "the red block"}
    )
    (one,) = found.result.objects
    assert np.abs(np.array(one.box) - lying_jpeg.block).max() <= 4
    view = box.call("view_objects", {"object_ids": [one.object_id]})
    assert max(view.picture.size) == 768
    assert view.picture.width < view.picture.height
    saved = box.call(
        "save_objects",
        {"object_ids": [one.object_id], "folder": str(out), "formats": ["png", "coco_rle"]},
    )
    files = {Path(name).suffix: Path(name) for name in saved.result.files}
    assert Image.open(files[".png"]).size == lying_jpeg.size
    coco = COCO(files[".json"])
    assert (coco.imgs[1]["width"], coco.imgs[1]["height"]) == lying_jpeg.size
    mask = coco.annToMask(coco.anns[1]).astype(bool)
    assert np.logical_xor(mask, lying_jpeg.pixels).sum() < 0.02 * mask.sum()


def test_the_command_line_answers_in_pixels_of_the_upright_picture(
    lying_jpeg, tmp_path, monkeypatch
):
    monkeypatch.setattr("sam4mllm_tool.pipeline.model.load", lambda *_, **__: lying_jpeg.model)
    command = ["segment", str(lying_jpeg.path), "the red block", "--json", "--out", str(tmp_path)]
    document = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert document["image_size"] == list(lying_jpeg.size)
    (one,) = document["objects"]
    assert np.abs(np.array(one["box"]) - lying_jpeg.block).max() <= 4
    assert one["mask"]["size"] == list(lying_jpeg.size[::-1])
    assert any("upright" in note for note in document["notes"])
    for name in document["files"]:
        if name.endswith(".png"):
            assert Image.open(name).size == lying_jpeg.size


async def test_an_agent_gets_pixels_of_the_upright_picture(lying_jpeg):
    arguments = {"image": str(lying_jpeg.path), "expression": "the red block"}
    with over_http(lambda: lying_jpeg.model, allow_dirs=[lying_jpeg.path.parent]) as address:
        async with Client(address) as client:
            result = await client.call_tool("segment_object", arguments)
    assert not result.is_error
    (one,) = result.structured_content["objects"]
    assert np.abs(np.array(one["box"]) - lying_jpeg.block).max() <= 4


FIFTY_MEGAPIXELS = """
    import re, sys
    from pathlib import Path
    from sam4mllm_tool.drawing.overlay import numbered_view, overlay_masks
    from sam4mllm_tool.images.loading import load_image
    from sam4mllm_tool.types import Mask
    import numpy as np

    image = load_image(sys.argv[1]).image
    assert image.size == (5776, 8640), image.size
    pixels = np.zeros((8640, 5776), bool)
    pixels[1000:8000, 500:5000] = True
    mask = Mask(pixels)
    assert Mask.from_rle(mask.to_rle()) == mask
    assert max(numbered_view(image, {1: mask}).size) == 768
    assert overlay_masks(image, {1: mask}).size == image.size
    # Not ru_maxrss: that is passed on from the process that started this one.
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_memory_of_fifty_megapixels_is_bounded(tmp_path):
    """150 MB of pixels; a few copies of them at a time, never floats of all of them."""
    path = tmp_path / "large.jpg"
    lying(Image.new("RGB", (5776, 8640), GREY), path, quality=50)
    code = textwrap.dedent(FIFTY_MEGAPIXELS)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1100, f"{done.stdout} MB"
