"""Candidates for a phrase: the strategy, the tool and the workflow, over stand-ins."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from sam4mllm_integrations.langgraph_workflow import QuestionSettings, question_graph

from sam4mllm_tool.errors import ExpressionError, InputError
from sam4mllm_tool.pipeline.candidates import noun_phrase, propose
from sam4mllm_tool.pipeline.model import Sam4MLLM, replay
from sam4mllm_tool.pipeline.points import inner_points
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.protocols import Proposal, Proposer
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.tools.state import StateStore
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import Workspace
from sam4mllm_tool.types import Box, Mask, Point, Status, YesNo

RED, BLUE = Box(70, 15, 190, 45), Box(10, 54, 50, 114)


@dataclass
class ListedProposer:
    """Proposes what it was given, whatever the phrase."""

    found: list
    name: str = "listed"
    asked: list = field(default_factory=list)

    def propose(self, image, phrase, limit):
        self.asked.append((phrase, limit))
        return self.found[:limit]


@dataclass
class MarkedMllm(ScriptedMllm):
    """Scripted; keeps the pictures and the last questions it was asked."""

    seen: list = field(default_factory=list)

    def answer_yes_no(self, image, dialogue, *, words, count):
        self.seen.append((image, dialogue[-1].text))
        return self.answers.pop(0)


def corner(box: Box) -> Mask:
    """An L inside a box, which no segmenter would draw."""
    pixels = np.zeros((120, 200), bool)
    x0, y0, x1, y1 = map(int, box)
    pixels[y0:y1, x0 : x0 + 12] = True
    pixels[y1 - 9 : y1, x0:x1] = True
    return Mask(pixels)


def over(truth, *proposals, **settings):
    """The pipeline with a proposer that lists these."""
    proposer = ListedProposer(list(proposals))
    assert isinstance(proposer, Proposer)
    chosen = Settings(strategy="propose", **settings)
    return Sam4MLLM(TruthfulMllm(truth), ColourSegmenter(), chosen, proposer=proposer)


# -- where to ask --------------------------------------------------------------------------------


def test_inner_points_are_the_centres_of_the_largest_circles():
    regions = np.zeros((60, 100), int)
    regions[10:31, 5:76] = 1  # 71 wide, 21 high
    regions[40:51, 50:61] = 2  # 11 by 11
    first, *others = inner_points(regions, 30)
    assert abs(first.x - 40.5) <= 1 and abs(first.y - 20.5) <= 1
    assert all(regions[int(p.y), int(p.x)] for p in others)
    assert max(abs(p.x - 40.5) for p in others[:2]) > 20  # then the ends
    assert {p.y > 35 for p in others} == {False, True}
    assert all(p.y < 35 for p in inner_points(regions, 12, least=7))
    # A point that was asked about counts as a border.
    (next_one,) = inner_points(regions, 1, [first])
    assert abs(next_one.x - first.x) > 10
    assert inner_points(np.zeros((5, 7), int), 3) == []


def test_regions_that_touch_are_apart():
    regions = np.ones((40, 80), int)
    regions[:, 30:] = 2
    points = inner_points(regions, 2)
    assert all(abs(p.x - 30) > 12 for p in points)
    (left,) = inner_points(regions[:, :45], 1, [Point(37.5, 20.5)])
    assert abs(left.x - 15) < 3  # the right part is split by the point that was asked about


def test_large_pictures_are_measured_coarsely_and_hit_all_the_same():
    regions = np.zeros((700, 2000), int)
    regions[100:400, 1200:1900] = 3
    (point,) = inner_points(regions, 1)
    assert abs(point.y - 250) < 10 and 1340 < point.x < 1760


# -- the strategy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "phrase"),
    [
        ("the red apple left of the dog", "red apple"),
        ("The cup to the right of a plate", "cup"),
        ("all cups", "cups"),
        ("a cup of coffee", "cup of coffee"),
        ("an umbrella that is open", "umbrella"),
        ("the person in the red coat", "person"),
        ("the onlooker", "onlooker"),
        ("what you would cut paper with", "what you would cut paper"),
        ("the", "the"),
    ],
)
def test_what_a_text_prompted_proposer_is_asked_for(expression, phrase):
    assert noun_phrase(expression) == phrase


def test_the_mllm_chooses_among_candidates_in_any_order(blocks, truth):
    model = over(truth, Proposal(BLUE, 0.9), Proposal(RED, 0.4))
    found = model.segment(blocks, "the red block")
    assert model.proposer.asked == [("red block", 8)]
    (one,) = found.objects
    assert one.mask == truth["the red block"][0]
    assert one.located.box == RED and [o.box for o in one.located.alternates] == [BLUE]
    assert len(one.points) == 3 and all(p.label == "foreground" for p in one.points)
    assert found.location.dialogue[-1].text == "[350,125,950,375]"


def test_without_a_proposer_the_mllms_own_boxes_are_the_candidates(blocks, truth):
    model = Sam4MLLM(TruthfulMllm(truth), ColourSegmenter())
    assert [one.box for one in propose(model, blocks, "the blue block")] == [BLUE, RED]
    found = model.segment(blocks, "the blue block", strategy="propose")
    assert [one.mask for one in found.objects] == truth["the blue block"]
    assert found.objects[0].located.alternates[0].box == RED


def test_a_proposers_mask_is_kept_as_it_is(blocks, truth):
    odd = {"the red block": [corner(RED)]}
    model = over(odd, Proposal(BLUE, 0.9, corner(BLUE)), Proposal(RED, 0.8, corner(RED)))
    found = model.segment(blocks, "the red block")
    assert [one.mask for one in found.objects] == [corner(RED)]
    assert model.segmenter.prompts == [] and found.objects[0].drawn.logits is None


def test_how_many_may_be_meant(blocks, truth):
    twice = Box(71, 15, 190, 46)  # the red block once more
    model = over(truth, Proposal(twice, 0.9), Proposal(RED, 0.8), Proposal(BLUE, 0.7))
    assert len(model.segment(blocks, "all blocks").objects) == 2
    assert len(model.segment(blocks, "all blocks", count="1").objects) == 1
    nothing = model.segment(blocks, "the green block")
    assert nothing.status is Status.NOT_FOUND and nothing.objects == ()
    assert nothing.location.dialogue[-1].text == "No object found."
    assert len(model.segment(blocks, "the green block", count="1+").objects) == 1
    empty = over(truth).segment(blocks, "the red block", count="1")
    assert empty.status is Status.NOT_FOUND


def test_a_part_of_an_accepted_candidate_is_no_object_of_its_own(blocks, truth):
    part = Box(100, 15, 190, 45)
    model = over(truth, Proposal(part, 0.3), Proposal(RED, 0.6), Proposal(BLUE, 0.5))
    assert [o.located.box for o in model.segment(blocks, "all blocks").objects] == [RED, BLUE]


def test_a_run_is_replayed_from_its_trace_with_the_proposers_masks(blocks, truth, tmp_path):
    odd = {"the red block": [corner(RED)]}
    model = over(odd, Proposal(BLUE, 0.9), Proposal(RED, 0.8, corner(RED)))
    found = model.segment(blocks, "the red block")
    trace = Trace.load(found.trace.save(tmp_path / "run.json"))
    assert trace.models["proposer"] == "listed"
    assert trace.timings.keys() >= {"propose", "points"}
    again = replay(trace, blocks, ColourSegmenter())
    assert [one.mask for one in again.objects] == [corner(RED)]
    page = found.trace.save(tmp_path / "run.html", blocks).read_text()
    assert "red block" in page
    with pytest.raises(InputError, match="does not hold"):
        replay(trace.model_copy(update={"proposal_calls": []}), blocks, ColourSegmenter())


def test_families_that_read_marks_are_asked_once_about_all_candidates(blocks):
    mllm = MarkedMllm([], [[YesNo(0.1, 0.8), YesNo(0.7, 0.2)]])
    proposer = ListedProposer([Proposal(RED, 0.9), Proposal(BLUE, 0.8)])
    settings = Settings(strategy="propose", point_asking="marks")
    model = Sam4MLLM(mllm, ColourSegmenter(), settings, proposer=proposer)
    found = model.segment(blocks, "it")
    assert [one.located.box for one in found.objects] == [BLUE]
    ((picture, question),) = mllm.seen
    assert question == model.speech.ask_marks("it", [1, 2])
    changed = np.argwhere((picture.array != blocks.array).any(axis=2))
    for x, y in (RED.centre, BLUE.centre):
        assert np.abs(changed + 0.5 - [y, x]).max(axis=1).min() < 3


@pytest.mark.parametrize("phrase", ["", "  ", "x" * 3000])
def test_a_phrase_must_be_a_text(blocks, truth, phrase):
    with pytest.raises(ExpressionError):
        propose(over(truth, Proposal(RED)), blocks, phrase)


# -- the tool ------------------------------------------------------------------------------------


def call(toolbox, name, **arguments):
    return toolbox.call(name, arguments)


def test_candidates_get_handles_and_earlier_objects_keep_theirs(blocks_file, truth):
    box = Toolbox(over(truth, Proposal(BLUE, 0.9), Proposal(RED, 0.4)))
    image = str(blocks_file)
    call(box, "segment_object", image=image, expression="the blue block", strategy="box_only")
    output = call(box, "propose_objects", image=image, phrase="block")
    assert [one.object_id for one in output.result.candidates] == ["obj_2", "obj_3"]
    assert [one.confidence for one in output.result.candidates] == [0.9, 0.4]
    assert [one.is_meant for one in output.result.candidates] == [None, None]
    assert output.masks["obj_3"] == truth["the red block"][0]
    assert "view_objects" in output.text and "confidence 0.90" in output.text
    again = call(box, "propose_objects", image=image, phrase="block")
    assert [one.object_id for one in again.result.candidates] == ["obj_4", "obj_5"]
    view = call(box, "view_objects", image=image)
    assert list(view.result.shown.values()) == ["obj_1", "obj_2", "obj_3", "obj_4", "obj_5"]


def test_with_an_expression_the_model_judges_and_round_2_goes_on(blocks_file, truth):
    box = Toolbox(over(truth, Proposal(BLUE, 0.9), Proposal(RED, 0.4)))
    arguments = {"image": str(blocks_file), "phrase": "block", "expression": "the red block"}
    output = call(box, "propose_objects", **arguments)
    first, second = output.result.candidates
    assert (first.object_id, first.box) == ("obj_1", list(RED))
    assert (first.is_meant, second.is_meant) == (pytest.approx(0.97), pytest.approx(0.03))
    assert (first.points_inside, second.points_outside) == (3, 3)
    assert output.text.endswith("The model takes obj_1 to be meant.")
    answer = call(box, "is_point_inside_object", object_id="obj_1", points=[{"x": 80, "y": 40}])
    assert answer.result.points[0].answer == "inside"
    none = call(box, "propose_objects", **{**arguments, "expression": "the green block"})
    assert "takes none of them" in none.text
    nothing = call(Toolbox(over(truth)), "propose_objects", **arguments).result
    assert (nothing.status, nothing.candidates) == ("not_found", [])


def test_a_proposers_mask_outlives_the_process_and_can_be_refined(blocks_file, truth, tmp_path):
    odd = {"the red block": [corner(RED)]}
    model = over(odd, Proposal(RED, 0.8, corner(RED)))
    store = StateStore(tmp_path)
    before = Toolbox(model, Workspace(state=store.workspace("a")))
    image = str(blocks_file)
    call(before, "propose_objects", image=image, phrase="block")
    call(before, "segment_object", image=image, expression="the red block")
    store.close()
    store = StateStore(tmp_path)
    after = Toolbox(model, Workspace(state=store.workspace("a")))
    for handle in ("obj_1", "obj_2"):
        assert after.workspace.object(handle).mask == corner(RED)
    refined = call(after, "segment_with_prompts", object_id="obj_1")
    assert refined.masks["obj_3"] == truth["the red block"][0]  # the segmenter's, from the box
    assert after.workspace.object("obj_1").mask == corner(RED)
    store.close()


# -- the question workflow -----------------------------------------------------------------------


@pytest.mark.parametrize("proposer", [None, ListedProposer([Proposal(BLUE), Proposal(RED)])])
def test_the_workflow_proposes_and_selects(blocks_file, truth, proposer):
    mllm = TruthfulMllm(truth)
    mllm.notes = mllm.notes.model_copy(update={"vocabulary": frozenset({"red"})})
    toolbox = Toolbox(replace(Sam4MLLM(mllm, ColourSegmenter()), proposer=proposer))
    graph = question_graph(toolbox, settings=QuestionSettings(candidates=4))
    state = graph.invoke({"question": "the red block", "image": str(blocks_file)})
    assert [step.partition(":")[0] for step in state["steps"]] == [
        "understand", "locate", "judge", "conclude"
    ]  # fmt: skip
    assert state["status"] == "found" and state["confident"]
    masks = [toolbox.workspace.object(one).mask for one in state["object_ids"]]
    assert masks == truth["the red block"]
    assert len(toolbox.workspace.objects()) == 2  # the other candidate is there to go back to
    if proposer:
        assert proposer.asked == [("red block", 8)]  # as many as the settings of the model say


def test_a_proposer_in_the_way_of_a_point(blocks, truth):
    """A candidate without a pixel is asked about at the centre of its box."""
    thin = Proposal(Box(120, 60, 121, 61), 0.9, Mask(np.zeros((120, 200), bool)))
    model = over(truth, thin)
    found = model.segment(blocks, "the red block", count="1")
    assert [Point(p.x, p.y) for p in found.objects[0].points] == [Point(120.5, 60.5)]
