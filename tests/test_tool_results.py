"""What an agent reads, and which of its arguments reach the models."""

from dataclasses import dataclass, field

import pytest

from sam4mllm_tool.errors import AccessDenied, InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.protocols import CheckpointNotes, Reply
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace
from sam4mllm_tool.types import YesNo

RED_BOX, BLUE_BOX = "[350,125,950,375]", "[050,450,250,950]"
CALIBRATED = CheckpointNotes(box_calibration=(1, 1))  # score = e l / (1 + e l)


@dataclass
class ScoringMllm(ScriptedMllm):
    """Scripted, with scored replies; keeps the dialogues it was asked in."""

    asked: list = field(default_factory=list)

    def generate(self, image, dialogue, *, grammar=None, max_new_tokens=256):
        self.asked.append(dialogue)
        return Reply(self.replies.pop(0), -0.1, 1)

    def alternates(self, image, dialogue, *, grammar, count):
        return [Reply(text, -0.1 * n, 1) for n, text in enumerate(self.replies[:count], 1)]

    def answer_yes_no(self, image, dialogue, *, words, count):
        self.asked.append(dialogue)
        return self.answers.pop(0)


def scripted(replies, answers=(), notes=CALIBRATED, **settings):
    mllm = ScoringMllm(list(replies), list(answers), notes=notes)
    return Toolbox(Sam4MLLM(mllm, ColourSegmenter(), Settings(**settings))), mllm


def call(toolbox, name, **arguments):
    return toolbox.call(name, arguments)


def test_the_line_of_an_object_holds_all_its_numbers(blocks_file):
    answers = [[YesNo(0.9, 0.05)] * 7 + [YesNo(0.3, 0.3)] * 2]
    box, _ = scripted([RED_BOX], answers)
    output = call(box, "segment_object", image=str(blocks_file), expression="the red block")
    assert output.text == (
        "img_1 (200x120): obj_1 'the red block' box [70.0, 15.0, 190.0, 45.0], score 0.71, "
        "mask 3600 px (15.0% of the image), predicted IoU 0.90, "
        "points 7 inside, 0 outside, 2 undecided"
    )
    (one,) = output.result.objects
    assert (one.score, one.predicted_iou) == (pytest.approx(0.7109, abs=5e-5), 0.9)
    assert (one.points_inside, one.points_outside, one.points_undecided) == (7, 0, 2)
    assert output.result.questions == 2
    assert output.trace is not None and output.trace.image["source"] == str(blocks_file)


def test_other_boxes_and_the_next_step_are_named(blocks_file):
    box, _ = scripted([RED_BOX, BLUE_BOX, "[010,020,030,040]"])
    output = call(
        box, "locate_object", image=str(blocks_file), expression="it", count="1", alternates=2
    )
    assert output.text.splitlines() == [
        "img_1 (200x120): obj_1 'it' box [70.0, 15.0, 190.0, 45.0], score 0.71",
        "Next: is_point_inside_object, then segment_with_prompts.",
        "Other box: [10.0, 54.0, 50.0, 114.0], score 0.69",
        "Other box: [2.0, 2.4, 6.0, 4.8], score 0.67",
    ]
    assert [one.box for one in output.result.alternates] == [[10, 54, 50, 114], [2, 2.4, 6, 4.8]]
    assert [one.score for one in output.result.alternates] == pytest.approx(
        [0.69, 0.6682], abs=5e-5
    )
    assert output.result.questions == 1


@pytest.mark.parametrize("found", [True, False])
def test_what_the_checkpoint_cautions_of_ends_every_result(truth, blocks_file, found):
    notes = CheckpointNotes(caution="taught on toys")
    box = Toolbox(Sam4MLLM(TruthfulMllm(truth, notes=notes), ColourSegmenter()))
    expression = "the red block" if found else "the green block"
    for name in ("segment_object", "locate_object", "is_point_inside_object"):
        output = call(box, name, image=str(blocks_file), expression=expression)
        assert output.result.notes == ["taught on toys"]
        assert output.text.endswith("\nNote: taught on toys.")
        assert (output.result.status != "not_found") == found


def test_the_count_reaches_the_question(box_of, blocks_file):
    box, mllm = box_of
    for name in ("segment_object", "locate_object"):
        found = call(box, name, image=str(blocks_file), expression="all blocks", count="1")
        assert len(found.result.objects) == 1
        assert "describes (1):" in [text for text in mllm.said if "describes" in text][-1]


@pytest.fixture
def box_of(truth):
    mllm = TruthfulMllm(truth, certainty=0.7)
    return Toolbox(Sam4MLLM(mllm, ColourSegmenter())), mllm


def test_thresholds_and_the_number_of_points_are_the_agents(box_of, blocks_file):
    box, _ = box_of

    def counts(**arguments):
        arguments = {"image": str(blocks_file), "expression": "the red block", **arguments}
        (one,) = box.call("segment_object", arguments).result.objects
        return one.points_inside, one.points_outside, one.points_undecided

    assert counts() == (0, 0, 9)
    assert counts(p_yes_above=0.6) == (9, 0, 0)
    assert counts(p_no_above=0.2) == (0, 9, 0)  # even the rest of 0.3 counts as no
    assert counts(points=4, p_yes_above=0.6) == (4, 0, 0)
    assert counts(strategy="adaptive", points=2, p_yes_above=0.6) == (2, 0, 0)
    assert counts(strategy="box_only") == (0, 0, 0)


def test_thresholds_of_a_probe_are_the_agents(box_of, blocks_file):
    box, _ = box_of
    call(box, "locate_object", image=str(blocks_file), expression="the red block")

    def answers(**more):
        points = [{"x": 80, "y": 25}, {"x": 25, "y": 80}]
        return call(box, "is_point_inside_object", object_id="obj_1", points=points, **more).result

    assert [p.answer for p in answers().points] == ["undecided"] * 2
    assert [p.answer for p in answers(p_yes_above=0.6).points] == ["inside", "undecided"]
    assert [p.answer for p in answers(p_no_above=0.6).points] == ["undecided", "outside"]
    first, second = answers().points
    assert (first.p_yes, first.p_no) == pytest.approx((0.7, 0.3))
    assert (second.p_yes, second.p_no) == pytest.approx((0.3, 0.7))


def test_probabilities_are_given_to_four_places(blocks_file):
    box, _ = scripted([RED_BOX], [[YesNo(0.123456, 0.654321)]])
    points = [{"x": 80, "y": 25}]
    output = call(
        box, "is_point_inside_object", image=str(blocks_file), expression="it", points=points
    )
    (one,) = output.result.points
    assert (one.p_yes, one.p_no) == (0.1235, 0.6543)
    assert output.text == "img_1 (200x120): obj_1 (it):\n(80, 25) undecided, p_yes 0.12"


def test_only_so_many_points_are_listed_in_words(blocks_file, truth):
    box = Toolbox(Sam4MLLM(TruthfulMllm(truth), ColourSegmenter()))
    for number, more in ((40, None), (43, "… and 3 more in the structured result")):
        points = [{"x": x, "y": 30} for x in range(80, 80 + number)]
        arguments = {"image": str(blocks_file), "expression": "the red block", "points": points}
        lines = box.call("is_point_inside_object", arguments).text.splitlines()
        assert len(lines) == 41 + (more is not None)
        assert (lines[-1] == more) == (more is not None)
        assert not any("disagrees" in line for line in lines)


def test_points_of_an_object_without_a_dialogue_follow_its_box(blocks_file):
    box, mllm = scripted([], [[YesNo(0.9, 0.05)]])
    call(box, "segment_with_prompts", image=str(blocks_file), box=[70, 15, 190, 45])
    call(box, "is_point_inside_object", object_id="obj_1", points=[{"x": 80, "y": 25}])
    (dialogue,) = mllm.asked
    assert [turn.role for turn in dialogue] == ["system", "user", "assistant", "user"]
    assert dialogue[1].text.endswith('describes (1):\n"from prompts".')
    assert dialogue[2].text == RED_BOX
    assert dialogue[3].text.endswith(f"{RED_BOX}:\n(400,208)")


def test_a_refined_object_keeps_score_name_and_dialogue(blocks_file):
    box, _ = scripted([RED_BOX], [[YesNo(0.9, 0.05)] * 9])
    call(box, "segment_object", image=str(blocks_file), expression="the red block")
    point = {"x": 25, "y": 80, "label": "outside"}
    call(box, "segment_with_prompts", object_id="obj_1", points=[point])
    former, new = box.workspace.objects()
    assert (new.name, new.score, new.location) == (former.name, former.score, former.location)
    assert new.score is not None and new.location is not None
    assert len(new.points) == 10


def test_the_box_of_an_object_made_from_points_is_that_of_its_mask(model, blocks_file):
    box = Toolbox(model)
    points = [{"x": 25, "y": 80, "label": "inside"}]
    drawn = call(box, "segment_with_prompts", image=str(blocks_file), points=points)
    assert drawn.result.objects[0].box == [10, 54, 50, 114]


@pytest.mark.parametrize("corner", [[-5, -5, 0.5, 50], [-5, -5, 50, 0.5], [199.5, 0, 210, 9]])
def test_a_box_that_covers_half_a_pixel_is_drawn_from(model, blocks_file, corner):
    assert call(Toolbox(model), "segment_with_prompts", image=str(blocks_file), box=corner)


@pytest.mark.parametrize("box", [[-9, 5, 0, 9], [5, -9, 9, 0], [200, 5, 210, 9], [5, 120, 9, 130]])
def test_a_box_beside_the_picture_is_refused(model, blocks_file, box):
    with pytest.raises(InputError, match="covers nothing of the image") as caught:
        call(Toolbox(model), "segment_with_prompts", image=str(blocks_file), box=box)
    assert str(box[0]) in caught.value.message and caught.value.hint


def test_objects_of_two_images_or_without_masks_are_refused_by_name(model, blocks, blocks_file):
    box = Toolbox(model)
    call(box, "segment_object", image=str(blocks_file), expression="the red block")
    call(box, "locate_object", image="img_1", expression="all blocks")
    other = box.workspace.open_image(blocks.pil.crop((0, 0, 60, 119))).image_id
    call(box, "segment_with_prompts", image=other, box=[10, 54, 50, 114])
    for ids, complaint in [
        (["obj_1", "obj_4"], "the objects belong to different images"),
        (["obj_1", "obj_2", "obj_3"], "obj_2, obj_3 have no mask yet"),
    ]:
        with pytest.raises(InputError, match=complaint) as caught:
            call(box, "compare_objects", object_ids=ids)
        assert caught.value.hint
    shown = call(box, "view_objects", image=other)
    assert shown.result.shown == {4: "obj_4"}
    assert "Marked: 4 = obj_4 (from prompts)." in shown.text
    empty = call(box, "view_objects", image=str(blocks_file), object_ids=["obj_1"])
    assert "Marked: 1 = obj_1 (the red block)." in empty.text


def test_a_picture_without_masks_says_so(model, blocks_file):
    output = call(Toolbox(model), "view_objects", image=str(blocks_file))
    assert output.text.endswith("It has no objects with masks yet.")
    assert output.result.shown == {}


def test_complaints_name_the_argument_and_what_is_wrong_with_it(model):
    box = Toolbox(model)
    with pytest.raises(InputError) as caught:
        call(box, "segment_object", image="i", expression="x", points=0, colour="red")
    said = caught.value.message
    assert "points: Input should be greater than or equal to 1" in said
    assert "colour: is not an argument. Arguments: " in said and "errors.pydantic" not in said
    with pytest.raises(InputError, match=r"strategy: Input should be .*\(got 'pqp'\)") as caught:
        call(box, "segment_object", image="i", expression="x", strategy="pqp")
    with pytest.raises(InputError, match="fit: Value error, give object_id, or image and"):
        call(box, "is_point_inside_object")
    with pytest.raises(InputError) as caught:
        call(box, "segment_object", **{f"wrong_{n}": n for n in range(9)})
    assert caught.value.message.count(";") == 4


def test_a_workspace_of_ones_own_keeps_its_own_policy(model, blocks_file, tmp_path):
    (tmp_path / "else").mkdir()
    strict = Workspace(ImagePolicy(allowed_dirs=(tmp_path / "else",)))
    box = Toolbox(model).for_workspace(strict)
    assert box.workspace is strict
    with pytest.raises(AccessDenied):
        call(box, "view_objects", image=str(blocks_file))


def test_a_model_without_calibration_gives_no_score(blocks_file):
    box, _ = scripted([RED_BOX, BLUE_BOX], notes=CheckpointNotes())
    output = call(box, "locate_object", image=str(blocks_file), expression="it", alternates=1)
    assert output.result.objects[0].score is None
    assert "score" not in output.text
    assert output.text.endswith("Other box: [10.0, 54.0, 50.0, 114.0]")
