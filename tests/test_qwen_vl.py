"""Qwen-VL-Chat's format: replies, questions and pixels as its makers publish them."""

import pytest
from PIL import Image

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats import format_for, get_format
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm
from sam4mllm_tool.types import Box, RgbImage, TargetCount

FORMAT = get_format("qwen_vl")
ONE, ANY = TargetCount.ONE, TargetCount.ZERO_OR_MORE

# Replies of the README and of TUTORIAL.md (github.com/QwenLM/Qwen-VL), and their numbers.
DOCUMENTED = {
    "<ref>击掌</ref><box>(536,509),(588,602)</box>": [(536, 509, 588, 602)],
    '<ref>"击掌"</ref><box>(211,412),(577,891)</box>': [(211, 412, 577, 891)],
    "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>": [(588, 499, 725, 789)],
    "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref>"
    "<box>(219,424),(576,896)</box> playing on the beach<|endoftext|>": [
        (451, 379, 731, 806),
        (219, 424, 576, 896),
    ],
}


def without_tags(reply: str) -> str:
    """As a server writes it that leaves special tokens out."""
    for tag in ("<ref>", "</ref>", "<box>", "</box>", "<|endoftext|>"):
        reply = reply.replace(tag, "")
    return reply


@pytest.mark.parametrize("written", [str, without_tags], ids=["tags", "no tags"])
@pytest.mark.parametrize("reply", DOCUMENTED)
def test_documented_replies_are_read(reply, written):
    boxes = FORMAT.read_boxes(written(reply), (2000, 500)).boxes
    expected = [Box(x1 * 2, y1 / 2, x2 * 2, y2 / 2) for x1, y1, x2, y2 in DOCUMENTED[reply]]
    assert [tuple(box) for box in boxes] == [pytest.approx(tuple(box)) for box in expected]


def test_a_reply_lands_where_the_makers_drew_it():
    """The makers' drawing of this reply (Shanghai_Output.jpg, 5304 x 3540): lines of 50 pixels,
    whose middles were measured as the difference from the picture without them."""
    reply = (
        "<ref>上海环球金融中心</ref><box>(667,437),(760,874)</box>和"
        "<ref>东方明珠</ref><box>(506,75),(582,946)</box>"
    )
    tower, pearl = FORMAT.read_boxes(reply, (5304, 3540)).boxes
    assert (tower.x_min, tower.x_max) == pytest.approx((3537, 4031), abs=1)
    assert tower.y_max == pytest.approx(3093, abs=1)
    assert (pearl.x_min, pearl.x_max) == pytest.approx((2683, 3086), abs=1)


def test_numbers_of_the_expression_are_no_box():
    reply = "<ref>tile [10, 20, 30, 40]</ref><box>(100,200),(300,400)</box>"
    assert FORMAT.read_boxes(reply, (1000, 1000)).boxes == (Box(100, 200, 300, 400),)


def test_the_questions_are_the_documented_ones():
    assert FORMAT.ask_boxes("击掌", ONE, (9, 9)).replace('"', "") == "框出图中击掌的位置"
    assert FORMAT.ask_boxes("a dog", ANY, (9, 9)).startswith('框出图中"a dog"的位置')
    assert FORMAT.system_prompt == "You are a helpful assistant."  # openai_api.py


@pytest.mark.parametrize("reply", ["没有", "图中没有狗。", "图片中不存在红色的车", "none"])
def test_nothing_there_in_either_language(reply):
    assert FORMAT.read_boxes(reply, (640, 480)).boxes == ()


def test_other_replies_are_errors():
    with pytest.raises(DialogueError):
        FORMAT.read_boxes("图中是一只拉布拉多犬。", (640, 480))


def test_numbers_stay_below_a_thousand():
    assert FORMAT.write_boxes([Box(320, 0, 640, 480)], (640, 480)) == "<box>(500,0),(999,999)</box>"


def test_a_dialogue_through_the_pipeline():
    image = RgbImage.from_pil(Image.new("RGB", (100, 200)))
    mllm = ScriptedMllm([next(iter(DOCUMENTED))], format_name="qwen_vl")
    found = Sam4MLLM(mllm, ColourSegmenter()).locate(image, "击掌")
    assert [turn.role for turn in found.dialogue] == ["system", "user", "assistant"]
    assert found.objects[0].box == pytest.approx((53.6, 101.8, 58.8, 120.4))


def test_it_is_never_chosen_for_a_local_checkpoint():
    """transformers has no class for model_type "qwen"; its own code is not loaded."""
    assert format_for("qwen").name == "generic"
