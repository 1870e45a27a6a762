"""Exported scenes, read back by the package's own data set readers and by pycocotools."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam4mllm_tool.datasets import reasonseg, refer
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.scenes.export import export_scenes, rectangles
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import FULL_WORLD
from sam4mllm_tool.types import TargetCount

SCENES = [render_scene(FULL_WORLD, "val", index, 4) for index in range(5)]
PHRASES = [expressions(scene, random.Random(scene.index)) for scene in SCENES]


def said(keep):
    """(text, visible masks) of every expression that `keep` lets through."""
    return {
        (scene.index, phrase.text): [scene.objects[n].mask for n in phrase.targets]
        for scene, phrases in zip(SCENES, PHRASES, strict=True)
        for phrase in phrases
        if keep(phrase)
    }


@pytest.mark.parametrize(
    ("name", "files", "keep"),
    (
        (
            "refcoco",
            refer.ReferFiles("refcoco", "refcoco", "refs(unc)", ""),
            lambda p: len(p.targets) == 1,
        ),
        (
            "grefcoco",
            refer.ReferFiles("grefcoco", "grefcoco", "grefs(unc)", "", TargetCount.ZERO_OR_MORE),
            lambda p: True,
        ),
    ),
)
def test_refer_layouts(tmp_path, name, files, keep):
    export_scenes(tmp_path, 4, 5, "val", name)
    expected = said(keep)
    seen = set()
    for example in files.examples(tmp_path, "val"):
        scene = SCENES[int(example.image_id) - 1]
        assert example.open_image().size == scene.image.size
        for text in example.expressions:
            masks = expected[scene.index, text]
            assert len(masks) == len(example.masks)
            for truth, mask in zip(masks, example.truth(), strict=True):
                assert np.array_equal(truth, mask.pixels)
            seen.add((scene.index, text))
    assert seen == set(expected)


def test_reasonseg_layout(tmp_path):
    export_scenes(tmp_path, 4, 5, "val", "reasonseg")
    expected = said(lambda phrase: phrase.kind == "function")
    found = list(reasonseg.examples(tmp_path, "val"))
    assert len(found) == len(expected) > 0
    for example in found:
        (mask,) = expected[int(example.example_id[:6]), example.expressions[0]]
        assert np.array_equal(example.truth()[0].pixels, mask)


def test_coco_layout_opens_in_pycocotools(tmp_path):
    export_scenes(tmp_path, 4, 5, "val", "coco")
    coco = COCO(str(tmp_path / "annotations" / "instances_val.json"))
    for scene in SCENES:
        (image,) = coco.loadImgs([scene.index + 1])
        assert Image.open(tmp_path / "val" / image["file_name"]).size == scene.image.size
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        assert len(found) == len(scene.objects)
        for one, thing in zip(found, scene.objects, strict=True):
            assert np.array_equal(coco.annToMask(one) > 0, thing.mask)
            assert coco.cats[one["category_id"]]["name"] == thing.name


def test_plain_layout_and_sheet(tmp_path):
    export_scenes(tmp_path, 4, 5, "val", "plain", sheet=True)
    rows = [json.loads(line) for line in (tmp_path / "expressions.jsonl").read_text().splitlines()]
    expected = said(lambda phrase: True)
    assert len(rows) == len(expected)
    for row in rows:
        index = int(row["image"][7:13])
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["image"])), SCENES[index].image)
        for path, mask in zip(row["masks"], expected[index, row["text"]], strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / path)) > 0, mask)
    assert Image.open(tmp_path / "sheet.png").width > 1000


def test_rectangles_tile_any_mask():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.1, 0.5, 0.9, 1.0):
        mask = rng.random((13, 17)) < density
        painted = np.zeros(mask.shape, dtype=int)
        for (x0, y0), _, (x1, y1), _ in rectangles(mask):
            painted[y0 : y1 + 1, x0 : x1 + 1] += 1
        assert np.array_equal(painted, mask)


def test_wrong_requests_are_named(tmp_path):
    for arguments in ((0, 1, "val", "voc"), (0, 0, "val", "plain"), (0, 1, "validation", "plain")):
        with pytest.raises(InputError) as found:
            export_scenes(tmp_path, *arguments)
        assert found.value.hint
