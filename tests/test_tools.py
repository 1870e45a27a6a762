"""The tools as an agent calls them: by name, with JSON, over handles."""

import asyncio
import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam4mllm_tool.cli.mcp import named_tools
from sam4mllm_tool.errors import (
    AccessDenied,
    BackendError,
    CheckpointError,
    DialogueError,
    InputError,
    PointOutsideImage,
    PromptError,
    UnknownHandle,
)
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import Expression, ImageSource, ToolArguments, ToolResult
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace
from sam4mllm_tool.types import Box, TargetCount

TOOLS = [
    "segment_object",
    "locate_object",
    "propose_objects",
    "is_point_inside_object",
    "segment_with_prompts",
    "compare_objects",
    "view_objects",
    "save_objects",
]


@pytest.fixture
def box(model):
    return Toolbox(model)


def segment(box, path, expression="the red block", **more):
    arguments = {"image": str(path), "expression": expression, **more}
    return box.call("segment_object", arguments)


def test_the_registry_holds_the_eight_tools_with_closed_schemas():
    assert [spec.name for spec in BUILTIN_TOOLS] == TOOLS
    for spec in BUILTIN_TOOLS:
        schema = spec.arguments.model_json_schema()
        assert schema["additionalProperties"] is False
        assert all(p.get("description") for p in schema["properties"].values()), spec.name
        assert spec.read_only == (spec.name != "save_objects")


def test_listing_tools_loads_no_model():
    def never() -> Sam4MLLM:
        raise AssertionError("loaded")

    assert len(Toolbox(never).specs()) == 8


def test_segment_object_gives_handles_text_and_the_exact_mask(box, blocks_file, truth):
    output = segment(box, blocks_file)
    assert output.result.status == "found"
    assert output.result.image_id == "img_1"
    assert (output.result.image_width, output.result.image_height) == (200, 120)
    (one,) = output.result.objects
    assert one.object_id == "obj_1"
    assert one.area == 3600
    assert one.area_fraction == 0.15
    assert one.points_inside == 9
    assert output.masks["obj_1"] == truth["the red block"][0]
    assert "obj_1" in output.text
    assert "counts" not in output.text
    rle = output.artifact()["masks"]["obj_1"]
    assert int(coco_mask.area({**rle, "counts": rle["counts"].encode()})) == 3600
    json.dumps(output.artifact())


def test_not_found_says_what_to_do_next(box, blocks_file):
    output = segment(box, blocks_file, "the green block")
    assert output.result.status == "not_found"
    assert output.result.objects == []
    assert "simpler" in output.text


def test_step_by_step_is_the_same_as_in_one_call(box, blocks_file, truth):
    located = box.call("locate_object", {"image": str(blocks_file), "expression": "the red block"})
    object_id = located.result.objects[0].object_id
    assert located.result.objects[0].area is None
    probed = box.call("is_point_inside_object", {"object_id": object_id})
    assert [p.answer for p in probed.result.points] == ["inside"] * 9
    drawn = box.call("segment_with_prompts", {"object_id": object_id})
    assert drawn.result.objects[0].object_id == object_id
    assert drawn.masks[object_id] == segment(box, blocks_file).masks["obj_2"]


def test_points_are_answered_and_compared_with_the_mask(box, blocks_file):
    segment(box, blocks_file)
    points = [{"x": 80, "y": 25}, {"x": 25, "y": 80}]
    result = box.call("is_point_inside_object", {"object_id": "obj_1", "points": points}).result
    assert [p.answer for p in result.points] == ["inside", "outside"]
    assert [p.in_mask for p in result.points] == [True, False]
    assert not any(p.disagrees for p in result.points)
    # a mask that misses part of the object disagrees with the answer there
    half = box.call("segment_with_prompts", {"image": "img_1", "box": [70, 15, 130, 45]})
    object_id = half.result.objects[0].object_id
    record = box.workspace.object(object_id)
    located = box.workspace.object("obj_1").location
    from dataclasses import replace

    box.workspace.update_object(replace(record, location=located))
    told = box.call(
        "is_point_inside_object", {"object_id": object_id, "points": [{"x": 150, "y": 30}]}
    )
    assert told.result.points[0].disagrees
    assert "disagrees" in told.text


def test_an_expression_alone_is_located_first(box, blocks_file):
    arguments = {"image": str(blocks_file), "expression": "the blue block"}
    result = box.call("is_point_inside_object", arguments).result
    assert result.object_id == "obj_1"
    missing = box.call("is_point_inside_object", {**arguments, "expression": "nothing"})
    assert missing.result.status == "not_found"


def test_refining_keeps_the_former_mask(box, blocks_file, truth):
    segment(box, blocks_file)
    point = {"x": 25, "y": 80, "label": "background"}
    refined = box.call("segment_with_prompts", {"object_id": "obj_1", "points": [point]})
    assert refined.result.objects[0].object_id == "obj_2"
    assert refined.result.objects[0].points_outside == 1
    assert box.workspace.object("obj_1").mask == truth["the red block"][0]


def test_a_new_label_replaces_the_former_one_at_the_same_place(box, blocks_file):
    segment(box, blocks_file)
    (first, *others) = box.workspace.object("obj_1").points
    point = {"x": first.x, "y": first.y, "label": "outside"}
    refined = box.call("segment_with_prompts", {"object_id": "obj_1", "points": [point]})
    one = refined.result.objects[0]
    assert (one.points_inside, one.points_outside) == (8, 1)
    kept = box.workspace.object(one.object_id).points
    assert {(p.x, p.y): p.label.value for p in kept} == {
        (first.x, first.y): "background", **{(p.x, p.y): "foreground" for p in others}
    }  # fmt: skip
    # Asked again, the model's answer counts.
    again = {"object_id": one.object_id, "points": [{"x": first.x, "y": first.y}]}
    box.call("is_point_inside_object", again)
    assert {p.label.value for p in box.workspace.object(one.object_id).points} == {"foreground"}


def test_the_former_mask_is_refined_but_a_new_box_starts_over(model, box, blocks_file):
    segment(box, blocks_file)
    former = box.workspace.object("obj_1")
    box.call("segment_with_prompts", {"object_id": "obj_1"})
    box.call("segment_with_prompts", {"object_id": "obj_1", "box": [60, 10, 130, 50]})
    refined, anew = model.segmenter.prompts[-2:]
    assert refined.mask_logits is former.drawn.logits
    assert (refined.box, refined.points) == (former.box, former.points)
    assert anew.mask_logits is None
    assert (anew.box, anew.points) == (Box(60, 10, 130, 50), former.points)
    assert box.workspace.object("obj_3").mask.box == Box(70, 15, 130, 45)


def test_a_mask_made_by_combining_is_refined_without_logits(model, box, blocks_file):
    segment(box, blocks_file, "all blocks")
    arguments = {"object_ids": ["obj_1", "obj_2"], "combine": "union"}
    combined = box.call("compare_objects", arguments).result.combined
    assert combined.box == [10, 15, 190, 114] and combined.score is None
    assert combined.name == "union of obj_1, obj_2"
    point = {"x": 80, "y": 25, "label": "inside"}
    box.call("segment_with_prompts", {"object_id": combined.object_id, "points": [point]})
    assert model.segmenter.prompts[-1].mask_logits is None
    assert model.segmenter.prompts[-1].box == Box(10, 15, 190, 114)


def test_compare_measures_exactly(box, blocks_file):
    segment(box, blocks_file, "all blocks")
    arguments = {"object_ids": ["obj_1", "obj_2"], "combine": "union"}
    output = box.call("compare_objects", arguments)
    (pair,) = output.result.pairs
    assert pair.position == ["right_of", "above"]
    # From red's lowest left pixel (70, 44) to blue's highest right one (49, 53).
    assert pair.distance == round(math.hypot(21, 10) - 1, 1)
    assert pair.iou == pair.a_inside_b == 0
    assert output.result.combined.area == 3600 + 2400
    assert output.masks["obj_3"].area == 6000
    more = box.call("compare_objects", {"object_ids": ["obj_1", "obj_3"], "combine": "subtract"})
    assert more.result.pairs[0].a_inside_b == 1
    assert more.result.pairs[0].b_inside_a == pytest.approx(0.6)
    assert more.result.pairs[0].iou == pytest.approx(0.6)
    assert more.result.pairs[0].distance == 0
    assert more.result.combined.area == 0
    assert more.result.combined.box == [0, 0, 0, 0]
    empty = {"object_ids": ["obj_1", more.result.combined.object_id], "combine": "intersect"}
    nothing = box.call("compare_objects", empty)
    assert nothing.result.pairs[0].distance is None and nothing.result.combined.area == 0
    assert "obj_1 and obj_4 have no relation: one of the masks is empty" in nothing.text


def test_distances_and_combined_boxes_are_in_thousandths_too(model, blocks_file):
    box = Toolbox(model, coordinates="relative_1000")
    segment(box, blocks_file, "all blocks")
    arguments = {"object_ids": ["obj_1", "obj_2"], "combine": "union"}
    result = box.call("compare_objects", arguments).result
    assert result.pairs[0].distance == round((math.hypot(21, 10) - 1) / 0.2, 1)
    assert result.combined.box == [50, 125, 950, 950]
    assert result.combined.area == 6000
    located = box.call(
        "locate_object", {"image": "img_1", "expression": "the red block", "alternates": 2}
    ).result
    assert located.objects[0].box == [350, 125, 950, 375]
    assert [other.box for other in located.alternates] == [[50, 450, 250, 950]]


def test_view_is_bounded_and_numbered(box, blocks_file):
    segment(box, blocks_file, "all blocks")
    output = box.call("view_objects", {"image": "img_1", "max_side": 100})
    assert max(output.picture.size) <= 100
    assert output.result.shown == {1: "obj_1", 2: "obj_2"}
    cropped = box.call("view_objects", {"object_ids": ["obj_2"], "crop": True})
    assert cropped.picture.size == (345, 448)  # 57×74 pixels around the blue block, enlarged


def test_saved_files_read_back_exactly(model, blocks_file, tmp_path, truth):
    box = Toolbox(model, Workspace(ImagePolicy(output_dirs=(tmp_path,))))
    segment(box, blocks_file, "all blocks")
    formats = ["png", "coco_rle", "coco_polygons", "overlay"]
    arguments = {"object_ids": ["obj_1", "obj_2"], "folder": str(tmp_path / "out")}
    output = box.call("save_objects", {**arguments, "formats": formats})
    files = {path.rpartition("/")[2]: path for path in output.result.files}
    assert sorted(files) == [
        "img_1_coco_polygons.json",
        "img_1_coco_rle.json",
        "img_1_obj_1.png",
        "img_1_obj_2.png",
        "img_1_overlay.png",
    ]
    saved = np.asarray(Image.open(files["img_1_obj_2.png"])) == 255
    assert np.array_equal(saved, truth["the blue block"][0].pixels)
    for name in ("img_1_coco_rle.json", "img_1_coco_polygons.json"):
        coco = COCO(files[name])
        masks = [coco.annToMask(a).astype(bool) for a in coco.loadAnns(coco.getAnnIds())]
        assert np.array_equal(masks[0], truth["the red block"][0].pixels)
        assert np.array_equal(masks[1], truth["the blue block"][0].pixels)
        red, blue = coco.loadAnns(coco.getAnnIds())
        assert (red["bbox"], blue["bbox"]) == ([70, 15, 120, 30], [10, 54, 40, 60])
        assert (red["area"], blue["area"]) == (3600, 2400)
        assert (red["object_id"], blue["object_id"]) == ("obj_1", "obj_2")
        assert coco.imgs[1] == {
            "id": 1, "file_name": "blocks.png", "width": 200, "height": 120,
        }  # fmt: skip


def test_relative_coordinates_go_in_and_out(model, blocks_file, truth):
    box = Toolbox(model, coordinates="relative_1000")
    assert "thousandths" in box.specs()[0].description
    output = segment(box, blocks_file)
    assert output.result.objects[0].box == pytest.approx([350, 125, 950, 375])
    points = [{"x": 400, "y": 208}, {"x": 1000, "y": 1000}]
    told = box.call("is_point_inside_object", {"object_id": "obj_1", "points": points})
    assert [p.answer for p in told.result.points] == ["inside", "outside"]
    drawn = box.call("segment_with_prompts", {"image": "img_1", "box": [350, 125, 950, 375]})
    assert drawn.masks[drawn.result.objects[0].object_id] == truth["the red block"][0]


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("segment", {}, InputError),
        ("segment_object", {}, InputError),
        ("segment_object", {"image": "IMAGE", "expression": ""}, InputError),
        ("segment_object", {"image": "IMAGE", "expression": "x", "colour": "red"}, InputError),
        ("segment_object", {"image": "/nowhere.png", "expression": "x"}, InputError),
        ("segment_object", {"image": "img_7", "expression": "x"}, UnknownHandle),
        ("segment_object", {"image": "http://127.0.0.1/x.png", "expression": "x"}, AccessDenied),
        ("is_point_inside_object", {}, InputError),
        ("is_point_inside_object", {"object_id": "obj_7"}, UnknownHandle),
        ("is_point_inside_object", {"object_id": "obj_1", "points": []}, PromptError),
        (
            "is_point_inside_object",
            {"object_id": "obj_1", "points": [{"x": 500, "y": 1}]},
            PointOutsideImage,
        ),
        (
            "is_point_inside_object",
            {"object_id": "obj_1", "points": [{"x": float("nan"), "y": 1}]},
            PromptError,
        ),
        ("segment_with_prompts", {"image": "img_1"}, InputError),
        ("segment_with_prompts", {"image": "img_1", "box": [50, 50, 10, 10]}, PromptError),
        ("segment_with_prompts", {"image": "img_1", "box": [500, 500, 600, 600]}, PromptError),
        ("segment_with_prompts", {"image": "img_1", "box": [0, 0, 1]}, InputError),
        ("compare_objects", {"object_ids": ["obj_1"]}, InputError),
        ("view_objects", {}, InputError),
        ("save_objects", {"object_ids": ["obj_9"], "folder": "/tmp"}, UnknownHandle),
    ],
)
def test_bad_calls_are_input_errors_with_hints_and_nothing_is_lost(
    box, blocks_file, name, arguments, error
):
    segment(box, blocks_file)
    arguments = {k: str(blocks_file) if v == "IMAGE" else v for k, v in arguments.items()}
    with pytest.raises(error) as caught:
        box.call(name, arguments)
    assert isinstance(caught.value, InputError)
    assert caught.value.hint
    assert box.call("view_objects", {"image": "img_1"}).result.shown == {1: "obj_1"}


def test_saving_outside_the_allowed_folders_is_refused(model, blocks_file, tmp_path):
    policy = ImagePolicy(allowed_dirs=(blocks_file.parent,), output_dirs=(tmp_path / "out",))
    box = Toolbox(model, Workspace(policy))
    segment(box, blocks_file)
    for folder in ("/var/elsewhere", blocks_file.parent):  # what may be read may not be written
        with pytest.raises(AccessDenied):
            box.call("save_objects", {"object_ids": ["obj_1"], "folder": str(folder)})


def test_a_reply_that_does_not_parse_is_a_dialogue_error(blocks_file):
    box = Toolbox(Sam4MLLM(ScriptedMllm(["mumble"]), ColourSegmenter()))
    with pytest.raises(DialogueError, match="no box"):
        segment(box, blocks_file)


def test_a_missing_checkpoint_is_a_backend_error_every_time(blocks_file):
    def broken() -> Sam4MLLM:
        raise CheckpointError("gone", hint="put it back")

    box = Toolbox(broken)
    for _ in range(2):
        with pytest.raises(BackendError, match="gone"):
            segment(box, blocks_file)


def test_clients_share_the_model_and_nothing_else(box, blocks_file):
    segment(box, blocks_file)
    other = box.for_workspace(Workspace())
    assert other.model is box.model
    with pytest.raises(UnknownHandle):
        other.call("view_objects", {"object_ids": ["obj_1"]})


async def test_many_async_calls_at_once_get_their_own_answers(box, blocks_file):
    expressions = ["the red block", "the blue block", "nothing"] * 4
    outputs = await asyncio.gather(
        *(
            box.acall("segment_object", {"image": str(blocks_file), "expression": expression})
            for expression in expressions
        )
    )
    areas = [o.result.objects[0].area if o.result.objects else None for o in outputs]
    assert areas == [3600, 2400, None] * 4


def test_the_shipped_models_behind_the_tools(embedded_model, demo_image):
    box = Toolbox(embedded_model)
    record = box.workspace.open_image(demo_image[0].pil)
    arguments = {"image": record.image_id, "expression": demo_image[1], "count": "1"}
    output = box.call("segment_object", arguments)
    assert output.result.status == "found"
    assert output.result.questions == 2


# -- tools of one's own --------------------------------------------------------------------------


class CountArguments(ToolArguments):
    """Arguments of a user's tool."""

    image: ImageSource
    expression: Expression


class CountResult(ToolResult):
    """Result of a user's tool."""

    number: int


def count_objects(context: ToolContext, arguments: CountArguments) -> ToolOutput:
    """How many objects match."""
    record = context.workspace.open_image(arguments.image)
    number = len(
        context.model.segment(record.image, arguments.expression, count=TargetCount("0+")).objects
    )
    return ToolOutput(CountResult(text=f"{number} found", number=number))


COUNT = ToolSpec("count_objects", "Count objects.", CountArguments, CountResult, count_objects)


def test_tools_are_chosen_by_name_and_ones_own_are_added(model, blocks_file):
    box = Toolbox(model, tools=["segment_object", "save_objects", COUNT], read_only=True)
    assert [spec.name for spec in box.specs()] == ["segment_object", "count_objects"]
    arguments = {"image": str(blocks_file), "expression": "all blocks"}
    assert box.call("count_objects", arguments).result.number == 2
    with pytest.raises(InputError, match="no tool 'save_objects'"):
        box.call("save_objects", {})
    with pytest.raises(InputError, match="no tool 'segment_objct'") as caught:
        Toolbox(model, tools=["segment_objct"])
    assert "Did you mean 'segment_object'?" in caught.value.hint
    with pytest.raises(InputError, match="two tools are named 'count_objects'"):
        Toolbox(model, tools=[COUNT, COUNT])


async def test_a_tool_of_ones_own_reaches_every_framework(model, blocks_file):
    from mcp import Client
    from sam4mllm_integrations import openai_functions
    from sam4mllm_integrations.langchain_tools import Sam4MLLMToolkit
    from sam4mllm_integrations.mcp_server import ToolServer

    arguments = {"image": str(blocks_file), "expression": "all blocks"}
    box = Toolbox(model, tools=[COUNT])
    (tool,) = Sam4MLLMToolkit(toolbox=box).get_tools()
    assert tool.invoke(arguments) == "2 found"
    (function,) = openai_functions.chat_tools(box)
    assert function["function"]["name"] == "count_objects"
    assert set(function["function"]["parameters"]["required"]) == {"image", "expression"}
    server = ToolServer(lambda: model, [blocks_file.parent], tools=["view_objects", COUNT]).server
    async with Client(server) as client:
        assert [t.name for t in (await client.list_tools()).tools] == [
            "view_objects",
            "count_objects",
        ]
        reply = await client.call_tool("count_objects", arguments)
        assert reply.structured_content == {
            "status": "ok", "text": "2 found", "notes": [], "number": 2,
        }  # fmt: skip


def test_a_tool_of_ones_own_is_named_on_the_command_line(monkeypatch):
    named = named_tools("segment_object, test_tools:COUNT")
    assert [n if isinstance(n, str) else n.name for n in named] == [
        "segment_object",
        "count_objects",
    ]
    for wrong in ("test_tools:NOTHING", "no_such_module:X", "test_tools:TOOLS"):
        with pytest.raises(InputError) as caught:
            named_tools(wrong)
        assert caught.value.hint


@pytest.mark.parametrize(
    "name, arguments, nearest",
    [
        ("segment_object", {"image": "img_1", "expresion": "x"}, "expression"),
        ("segment_object", {"image": "img_1", "expression": "x", "strategy": "pqp"}, "pqpp"),
        ("segment_with_prompts", {"image": "i", "points": [{"x": 1, "y": 2, "label": "insde"}]},
         "inside"),
    ],
)  # fmt: skip
def test_a_misspelt_argument_names_the_nearest_one(box, name, arguments, nearest):
    with pytest.raises(InputError, match=f"Did you mean {nearest!r}"):
        box.call(name, arguments)
    with pytest.raises(InputError) as caught:
        box.call("segment_objects", {})
    assert "Did you mean 'segment_object'?" in caught.value.hint


@pytest.mark.parametrize("labels", [("inside", "outside"), ("foreground", "background")])
def test_both_words_for_a_label_are_understood(box, blocks_file, labels):
    points = [{"x": 80, "y": 25, "label": labels[0]}, {"x": 25, "y": 80, "label": labels[1]}]
    output = box.call("segment_with_prompts", {"image": str(blocks_file), "points": points})
    (one,) = output.result.objects
    assert (one.points_inside, one.points_outside) == (1, 1)
