"""Formats of model families: documented replies, round trips, hostile replies, exact strings."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference_resize

from sam4mllm_tool.errors import CheckpointError, DialogueError
from sam4mllm_tool.formats import FORMATS, format_for, get_format
from sam4mllm_tool.formats.grids import smart_resize
from sam4mllm_tool.types import Box, Point, PointLabel, TargetCount

STOCK = [known for known in FORMATS.values() if known.name != "sam4mllm"]
SIZE = (640, 480)

sides = st.integers(1, 6000)
sizes = st.tuples(sides, sides).filter(lambda size: max(size) / min(size) <= 150)
unit = st.floats(0, 1)


@st.composite
def sizes_and_boxes(draw):
    width, height = draw(sizes)
    xs, ys = sorted((draw(unit), draw(unit))), sorted((draw(unit), draw(unit)))
    return (width, height), Box(xs[0] * width, ys[0] * height, xs[1] * width, ys[1] * height)


def grid(known, size):
    """The size in pixels of one unit of the format's grid, across and down."""
    extent = known.grid.extent(size) if known.name != "sam4mllm" else (1000, 1000)
    return size[0] / extent[0], size[1] / extent[1]


# --- pixels → reply → pixels --------------------------------------------------------------------


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
@given(size_and_box=sizes_and_boxes())
def test_a_box_survives_the_round_trip_within_one_unit(known, size_and_box):
    size, box = size_and_box
    read = known.read_boxes(known.write_boxes([box], size), size)
    unit_x, unit_y = grid(known, size)
    # A side whose ends fall on one grid line is widened, by half a unit each way.
    unit_x *= 1.5 if box.width < unit_x else 1
    unit_y *= 1.5 if box.height < unit_y else 1
    assert len(read.boxes) == 1
    for value, expected, limit in zip(
        read.boxes[0], box, (unit_x, unit_y, unit_x, unit_y), strict=True
    ):
        assert abs(value - expected) <= limit + 1e-6
    x_min, y_min, x_max, y_max = read.boxes[0]
    assert 0 <= x_min < x_max <= size[0] + 1e-6 and 0 <= y_min < y_max <= size[1] + 1e-6


@given(size=sizes, numbers=st.lists(st.integers(0, 998), min_size=4, max_size=4))
def test_numbers_read_from_the_published_text_are_written_again(size, numbers):
    known, (a, b, c, d) = get_format("sam4mllm"), numbers
    text = f"[{a:03d},{b:03d},{max(a, c) + 1:03d},{max(b, d) + 1:03d}]"
    (box,) = known.read_boxes(text, size).boxes
    assert known.write_boxes([box], size) == text
    points = f"({a:03d},{b:03d}) ({c:03d},{d:03d})"
    (read,) = known.read_box_and_points(f"{text} {points}", 1, 1, size)
    asked = [Point(p.x, p.y) for p in read.points]
    assert asked == [(a / 1000 * size[0], b / 1000 * size[1]), (c / 1000 * size[0],
                                                                d / 1000 * size[1])]  # fmt: skip
    assert known.ask_points("it", box, asked, size).endswith(f"{text}:\n{points}")


def test_boxes_are_rounded_and_points_are_cut():
    known = get_format("sam4mllm")
    box = Box(64.3, 64.4, 191.9, 319.9)  # 100.47, 134.17, 299.84, 666.46 of 1000
    assert known.write_boxes([box], SIZE) == "[100,134,300,666]"
    points = known.ask_points("it", box, [Point(191.9, 319.99)], SIZE)
    assert points.endswith("[100,134,300,666]:\n(299,666)")


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_several_boxes_and_none_survive_the_round_trip(known):
    boxes = [Box(0, 0, 320, 240), Box(320, 240, 640, 480), Box(64, 48, 128, 96)]
    read = known.read_boxes(known.write_boxes(boxes, SIZE), SIZE).boxes
    assert len(read) == 3
    for one, other in zip(read, boxes, strict=True):
        assert one == pytest.approx(other, abs=1.01 * 640 / 560)
    assert known.read_boxes(known.write_boxes([], SIZE), SIZE).boxes == ()


@given(size=sizes, limits=st.sampled_from([(3136, 12845056), (200704, 1003520), (3136, 50176)]))
@example(size=(14, 98), limits=(3136, 12845056))  # half a factor wide: rounded to even, to nothing
@example(size=(3, 400), limits=(3136, 12845056))
def test_smart_resize_is_the_processors(size, limits):
    width, height = size
    assert (
        smart_resize(size, 28, *limits)
        == reference_resize(height, width, 28, min_pixels=limits[0], max_pixels=limits[1])[::-1]
    )


def test_smart_resize_reads_pixels_of_the_resized_picture():
    # 1000x500 becomes 1008x504: a reply in those pixels lands proportionally in the original.
    read = format_for("qwen2_5_vl").read_boxes('{"bbox_2d": [504, 252, 1008, 504]}', (1000, 500))
    assert read.boxes == (Box(500, 250, 1000, 500),)


def test_the_processors_pixel_limits_decide_the_frame():
    old = {"min_pixels": 3136, "max_pixels": 100_352, "patch_size": 14, "merge_size": 2}
    new = {"size": {"shortest_edge": 3136, "longest_edge": 100_352}}
    for config in (old, new):
        width, height = format_for("qwen2_5_vl", config).grid.extent((1000, 500))
        assert width * height <= 100_352
    assert format_for("qwen2_5_vl").grid.extent((1000, 500)) == (1008, 504)


# --- replies as the makers document them ----------------------------------------------------------

DOCUMENTED = {
    "qwen2_5_vl": (
        '```json\n[\n\t{"bbox_2d": [341, 258, 397, 360], "label": "top-left cupcake"},\n'
        '\t{"bbox_2d": [28, 56, 644, 476], "label": "table"}\n]\n```',
        [(341 / 644 * 640, 258 / 476 * 480, 397 / 644 * 640, 360 / 476 * 480),
         (28 / 644 * 640, 56 / 476 * 480, 640, 480)],
    ),
    "qwen3_vl": (
        '```json\n[\n\t{"bbox_2d": [250, 500, 1000, 1000], "label": "car"}\n]\n```',
        [(160, 240, 640, 480)],
    ),
    "qwen2_vl": (
        "<|object_ref_start|>the car<|object_ref_end|>"
        "<|box_start|>(250,500),(1000,1000)<|box_end|>",
        [(160, 240, 640, 480)],
    ),
    "internvl": (
        "<ref>the left dog</ref><box>[[250, 500, 500, 1000], [0, 0, 100, 100]]</box>",
        [(160, 240, 320, 480), (0, 0, 64, 48)],
    ),
    "glm4v": (
        "<think>The box might be [1, 2, 3, 4], but no.</think><answer>It is at "
        "<|begin_of_box|>[[250,500,500,1000]]<|end_of_box|>.</answer>",
        [(160, 240, 320, 480)],
    ),
    "gemma3": (
        '```json\n[\n  {"box_2d": [500, 250, 1000, 500], "label": "dog"}\n]\n```',
        [(160, 240, 320, 480)],
    ),
    "paligemma": (
        "<loc0512><loc0256><loc1023><loc0512> dog ; <loc0000><loc0000><loc0512><loc0512> cat",
        [(160, 240, 320, 479.53125), (0, 0, 320, 240)],  # bin 1023 of 1024
    ),
    "molmo": (
        ' <points x1="25.0" y1="50.0" x2="50.0" y2="100.0" alt="corners">corners</points>',
        [(160, 240, 320, 480)],
    ),
    "generic": (
        "Sure! The dog is at {'bbox_2d': [250, 500, 500, 1000], 'label': 'dog'}. Anything else?",
        [(160, 240, 320, 480)],
    ),
    "sam4mllm": ("[250,500,500,999]", [(160, 240, 320, 479.52)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_replies_are_read(name):
    reply, expected = DOCUMENTED[name]
    boxes = get_format(name).read_boxes(reply, SIZE).boxes
    assert len(boxes) == len(expected)
    for box, wanted in zip(boxes, expected, strict=True):
        assert box == pytest.approx(wanted, abs=0.01)


def test_molmo_2_writes_its_points_in_one_attribute():
    read = get_format("molmo").read_boxes(
        '<points coords="1 1 250 500 2 500 1000">x</points>', SIZE
    )
    assert read.boxes == (Box(160, 240, 320, 480),)


def test_one_molmo_point_is_no_box():
    with pytest.raises(DialogueError, match="one point"):
        get_format("molmo").read_boxes('<point x="25.0" y="50.0" alt="dog">dog</point>', SIZE)


BROKEN = {
    "cut off": '```json\n[{"bbox_2d": [250, 500, 500, 1000], "label": "do',
    "second one cut off": '[{"bbox_2d": [250, 500, 500, 1000]}, {"bbox_2d": [3',
    "single quotes": "[{'bbox_2d': [250, 500, 500, 1000]}]",
    "trailing comma": '[{"bbox_2d": [250, 500, 500, 1000,], }]'.replace(",]", "]"),
    "prose with other numbers": "Image 1 of 2 (640x480). The box is [250, 500, 500, 1000]; done.",
    "other key": '{"bounding_box": [250, 500, 500, 1000]}',
    "wrapped": '{"bbox_2d": [[250, 500, 500, 1000]]}',
    "decimals": "[250.0, 500.0, 500.0, 1000.0]",
    "spaces for commas": "[250 500 500 1000]",
    "corner pairs": "from (250, 500) to (500, 1000): (250, 500), (500, 1000)",
    "named": '{"x_min": 250, "y_min": 500, "x_max": 500, "y_max": 1000}',
    "named by number": "x1: 250, y1: 500, x2: 500, y2: 1000",
    "fractions": "[0.25, 0.5, 0.5, 1.0]",
    "swapped": "[500, 1000, 250, 500]",
    "said twice": "[250, 500, 500, 1000] and again [250, 500, 500, 1000]",
    "key beats prose": 'Not [1, 2, 3, 4] but {"bbox_2d": [250, 500, 500, 1000]}',
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_broken_replies_are_still_read(reply):
    assert get_format("generic").read_boxes(reply, SIZE).boxes == (Box(160, 240, 320, 480),)


@pytest.mark.parametrize(
    "reply",
    [
        "[]",
        "```json\n[]\n```",
        "None",
        "no.",
        "There are none.",
        "There is no red car in the image.",
        "The image does not contain a red car.",
        "I don't see any red car here.",
        "I cannot find a dog.",
        "This isn't in the image.",
        "No such object.",
        '{"bbox_2d": null}',
        "No object found.",
    ],
)
@pytest.mark.parametrize("known", STOCK, ids=lambda known: known.name)
def test_nothing_there_is_a_reading_not_an_error(known, reply):
    assert known.read_boxes(reply, SIZE).boxes == ()


@pytest.mark.parametrize(
    "reply", ["I cannot see the image.", "No image was provided.", "It is on the left.", "12345678"]
)
def test_a_reply_that_says_nothing_about_the_place_is_an_error(reply):
    with pytest.raises(DialogueError) as error:
        get_format("generic").read_boxes(reply, SIZE)
    assert error.value.raw_reply == reply
    assert error.value.hint


def test_corrected_boxes_carry_notes():
    read = get_format("generic").read_boxes("[500, 500, 500, 1200]", SIZE)
    assert any("widened" in note for note in read.notes)
    assert any("clamped" in note for note in read.notes)
    assert read.boxes[0].width == pytest.approx(0.64)


def test_a_model_in_a_loop_is_cut_short():
    reply = " ".join(f"[{n}, {n}, 1000, 1000]" for n in range(500))
    read = get_format("generic").read_boxes(reply, SIZE)
    assert len(read.boxes) == 64
    assert "first 64" in read.notes[0]


# --- hostile replies ------------------------------------------------------------------------------

pieces = st.sampled_from(
    ["[", "]", "(", ")", "{", "}", '"bbox_2d":', '"box_2d":', "<loc0100>", "<loc9999>",
     "points_on:", '<point x="', '" y="', "1e999", "NaN", "-5", "0", "999", "1000",
     "99999999999999", ".", ",", " ", "\n", "```json", "<think>", "</think>", "<answer>", "none",
     "No object found.", "null", "Yes", "\u0661\u0662\u0663", 'coords="1 1 100 100', "No", "x1: 4",
     "\x00"]
)  # fmt: skip
hostile = st.one_of(st.text(max_size=200), st.lists(pieces, max_size=60).map("".join))


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
@given(reply=hostile, size=sizes)
def test_a_hostile_reply_gives_boxes_in_the_image_or_a_dialogue_error(known, reply, size):
    try:
        boxes = list(known.read_boxes(reply, size).boxes)
        for prompts in known.read_box_and_points(reply, 2, 2, size):
            boxes.append(prompts.box)
            for point in prompts.points:
                assert 0 <= point.x < size[0] and 0 <= point.y < size[1]
    except DialogueError as error:
        assert error.raw_reply == reply
        return
    for box in boxes:
        assert all(map(math.isfinite, box)) and box.area > 0
        assert box.x_min >= -1e-6 and box.x_max <= size[0] + 1e-6
        assert box.y_min >= -1e-6 and box.y_max <= size[1] + 1e-6


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", ["[", "[1,", " ", "(1 1) ", "no ", "x1: 1 ", "<loc0001>", "\n"])
def test_long_garbage_is_read_in_linear_time(filler):
    for known in FORMATS.values():
        try:
            known.read_boxes(filler * 50_000, SIZE)
        except DialogueError:
            continue


# --- prompt points --------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [FORMATS["generic"], FORMATS["gemma3"]], ids=["xy", "yx"])
def test_labelled_points_are_read_in_the_families_order(known):
    on, off = ("[250, 500]", "[0, 1000]") if not known.y_first else ("[500, 250]", "[1000, 0]")
    reply = f'{{"{known.box_key}": [0, 0, 1000, 1000], "points_on": [{on}], "points_off": [{off}]}}'
    (prompts,) = known.read_box_and_points(reply, 1, 1, SIZE)
    assert [(p.x, p.y, p.label) for p in prompts.points] == [
        (160, 240, PointLabel.FOREGROUND),
        (0, 479.5, PointLabel.BACKGROUND),
    ]


def test_missing_points_name_a_way_out():
    with pytest.raises(DialogueError) as error:
        get_format("generic").read_box_and_points('{"bbox_2d": [1, 2, 3, 4]}', 1, 1, SIZE)
    assert "pqpp" in error.value.hint


# --- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", STOCK, ids=lambda known: known.name)
@pytest.mark.parametrize("count", TargetCount)
def test_questions_name_the_expression_and_keep_it_in_its_quotes(known, count):
    box, points = Box(64, 48, 320, 240), [Point(100, 100)]
    text = 'the "big" one\nignore this'
    asked = [
        known.ask_boxes(text, count, SIZE),
        known.ask_points(text, box, points, SIZE),
        known.ask_marks(text, [3]),
        known.ask_verification(text, box, SIZE),
        known.ask_box_and_points(text, count, 2, 2, SIZE),
    ]
    for question in asked:
        assert "the" in question and "big" in question and "one" in question
    if known.name not in ("internvl", "paligemma"):
        assert "\"the 'big' one ignore this\"" in asked[0]
    assert "3" in asked[2]
    assert known.points_per_question == 1
    assert "Yes" in known.yes_no.yes and " no" in known.yes_no.no


def test_round_two_states_coordinates_in_the_families_frame():
    box, point = Box(0, 0, 1000, 500), [Point(500, 125)]
    asked = {name: FORMATS[name].ask_points("a dog", box, point, (1000, 500)) for name in FORMATS}
    assert "[504, 126]" in asked["qwen2_5_vl"] and "[0, 0, 1008, 504]" in asked["qwen2_5_vl"]
    assert "[500, 250]" in asked["qwen3_vl"]
    assert "[250, 500]" in asked["gemma3"]
    assert "<loc0256><loc0512>" in asked["paligemma"]
    assert "(x=50.0, y=25.0)" in asked["molmo"]
    assert "(0,0),(1000,1000)" in asked["qwen2_vl"]


def test_the_published_strings_of_sam4mllm():
    known = get_format("sam4mllm")
    assert known.ask_boxes("the red apple", TargetCount.ONE, SIZE) == (
        "Please provide the bounding box coordinate of the region this sentence describes (1):\n"
        '"the red apple".'
    )
    assert "(1+):\n" in known.ask_boxes("apples", TargetCount.ONE_OR_MORE, SIZE)
    assert "(0+):\n" in known.ask_boxes("apples", TargetCount.ZERO_OR_MORE, SIZE)
    size = (1000, 1000)
    box = Box(281, 251, 863, 1000)
    points = [Point(822, 771), Point(5, 40)]
    assert known.ask_points("x", box, points, size) == (
        "Check if the points listed below are located on the object with bounding box "
        "[281,251,863,999]:\n(822,771) (005,040)"
    )
    assert known.write_boxes([box, box], size) == "[281,251,863,999] [281,251,863,999]"
    assert known.write_boxes([], size) == "No object found."
    assert known.yes_no.yes == ("Yes",)
    assert known.system_prompt == (
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using "
        "natural language."
    )


# --- choosing -------------------------------------------------------------------------------------


def test_model_types_find_their_format():
    assert format_for("qwen3_vl_moe").name == "qwen3_vl"
    assert format_for("glm46v").name == "glm4v"
    assert format_for("llava_next").name == "generic"
    assert format_for("qwen3_vl", {"min_pixels": 1}) is FORMATS["qwen3_vl"]
    with pytest.raises(CheckpointError, match="unknown dialogue format"):
        get_format("gpt")
