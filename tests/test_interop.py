"""Masks in other libraries' forms come back with the same pixels."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.masks import interop
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.masks.interop import LabelledMask
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import labelled_masks
from sam4mllm_tool.types import Mask

SIZE = (9, 13)
pixels = arrays(bool, SIZE)
scores = st.none() | st.floats(0, 1, width=32)
names = st.sampled_from(["cup", "dog"])
labelled = st.builds(LabelledMask, names, st.builds(Mask, pixels), scores, st.just(""))
lists = st.lists(labelled, max_size=4)


def ring() -> Mask:
    """A mask with a hole and a second piece."""
    array = np.zeros((20, 30), bool)
    array[2:12, 3:15] = True
    array[5:8, 6:10] = False
    array[15:19, 20:29] = True
    return Mask(array)


@given(lists)
@settings(max_examples=60, deadline=None)
def test_everything_round_trips(masks):
    names = [one.name for one in masks]
    bare = [LabelledMask(one.name, one.mask) for one in masks]
    assert interop.from_array(interop.to_array(masks), names) == bare
    assert interop.from_pil(interop.to_pil(masks), names) == bare
    assert interop.from_rows(json.loads(json.dumps(interop.to_rows(masks)))) == masks
    there = [one for one in bare if one.mask.area]
    for shapes in ("mask", "polygon"):
        document = interop.to_labelme(masks, "a.png", SIZE[1], SIZE[0], shapes=shapes)
        assert interop.from_labelme(json.loads(json.dumps(document))) == there


@given(lists)
@settings(max_examples=20, deadline=None)
def test_supervision_round_trips(masks):
    detections = interop.to_detections(masks)
    assert len(detections) == len(masks)
    assert interop.from_detections(detections) == masks


def test_supervision_reads_boxes_names_and_scores():
    masks = [LabelledMask("ring", ring(), 0.5), LabelledMask("all", Mask(np.ones((20, 30), bool)))]
    detections = interop.to_detections(masks)
    assert detections.xyxy.tolist() == [[3, 2, 29, 19], [0, 0, 30, 20]]
    assert detections.area.tolist() == [ring().area, 600]
    sure = detections[detections.confidence > 0.4]
    assert interop.from_detections(sure) == masks[:1]
    with pytest.raises(InputError, match="no masks"):
        detections.mask = None
        interop.from_detections(detections)


def test_a_dataset_keeps_every_column(tmp_path):
    from datasets import Dataset, load_from_disk

    masks = [LabelledMask("ring", ring(), 0.25), LabelledMask("nothing", Mask(ring().pixels & 0))]
    dataset = Dataset.from_list(interop.to_rows(masks), features=interop.features())
    dataset.save_to_disk(tmp_path)
    again = load_from_disk(tmp_path)
    assert again.features == interop.features()
    assert interop.from_rows(again) == masks
    assert again["box"][0] == [3, 2, 29, 19]


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_documents_of_a_workspace_are_read_back(polygons, model, blocks, truth):
    toolbox = Toolbox(model)
    for expression in ("the red block", "the blue block"):
        image = toolbox.workspace.open_image(blocks.pil).image_id
        toolbox.call("segment_object", {"image": image, "expression": expression})
    objects = toolbox.workspace.objects()
    record, masks = toolbox.workspace.image(image), labelled_masks(objects)
    document = masks_to_coco(masks, record.image, record.file_name, polygons=polygons)
    found = interop.from_coco(json.loads(json.dumps(document)))
    assert [(one.name, one.mask) for one in found] == [
        (name, truth[name][0]) for name in ("the red block", "the blue block")
    ]
    assert [m.mask for m in masks] == [one.mask for one in found]
    coco = COCO()
    coco.dataset = document
    coco.createIndex()
    assert np.array_equal(coco.annToMask(coco.anns[1]), truth["the red block"][0].pixels)
    document["images"] *= 2
    with pytest.raises(InputError, match="2 images"):
        interop.from_coco(document)


def test_labelme_documents_have_the_fields_the_program_needs():
    document = interop.to_labelme([LabelledMask("ring", ring())], "a.png", 30, 20)
    (shape,) = document["shapes"]
    assert shape["points"] == [[3, 2], [28, 18]]  # both corners included
    assert set(document) == {
        "version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth",
    }  # fmt: skip
    polygons = interop.to_labelme(
        [LabelledMask("ring", ring())], "a.png", 30, 20, shapes="polygon"
    )["shapes"]
    assert len(polygons) == 3
    assert {s["group_id"] for s in polygons} == {0}
    shape["shape_type"] = "circle"
    with pytest.raises(InputError, match="circle"):
        interop.from_labelme(document)


def test_masks_of_any_one_channel_picture():
    picture = Image.fromarray(ring().pixels)
    assert picture.mode == "1"
    assert interop.from_pil([picture], ["ring"]) == [LabelledMask("ring", ring())]
