"""Boxes verified by the MLLM's own answers: against distributions that are known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.pipeline.model import Sam4MLLM, replay
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.pipeline.verification import posterior
from sam4mllm_tool.protocols import CheckpointNotes, Reply
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import LOOK_ALIKE_WORLD
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Box, RgbImage, TargetCount, YesNo

RED, BLUE = Box(70, 15, 190, 45), Box(10, 54, 50, 114)
RED_TEXT, BLUE_TEXT = "[350,125,950,375]", "[050,450,250,950]"
BOTH, NONE = f"{RED_TEXT} {BLUE_TEXT}", "No object found."
POSTERIOR = CheckpointNotes(verification="posterior")


@dataclass
class BelievingMllm(ScriptedMllm):
    """Its greedy reply is scripted; sampled replies come as often as stated (of 32)."""

    beliefs: dict[str, int] = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def sample(self, image, dialogue, *, grammar, count):
        assert sum(self.beliefs.values()) == count
        self.asked.append((image, dialogue, grammar))
        return [Reply(text, -1.0, 4) for text, n in self.beliefs.items() for _ in range(n)]


def over(beliefs, replies=(), settings=None):
    mllm = BelievingMllm(list(replies), notes=POSTERIOR, beliefs=beliefs)
    return Sam4MLLM(mllm, ColourSegmenter(), settings or Settings(strategy="box_only"))


def test_the_share_of_answers_that_agree_is_the_probability(blocks):
    model = over({RED_TEXT: 12, BOTH: 4, BLUE_TEXT: 8, NONE: 8})
    wide = Box(70, 15, 190, 65)  # IoU .6 with the red block
    high = Box(70, 15, 190, 85)  # .43
    found = model.verify(blocks, "It", [RED, BLUE, wide, high, Box(120, 60, 190, 110)])
    expected = [16 / 32, 12 / 32, 16 / 32, 0, 0]
    assert [one.p_yes for one in found] == pytest.approx(expected)
    assert [one.p_no for one in found] == pytest.approx([1 - p for p in expected])
    ((image, dialogue, grammar),) = model.mllm.asked  # once for all boxes
    count = TargetCount.ZERO_OR_MORE
    assert image == blocks and grammar == model.speech.box_grammar(count)
    assert dialogue[-1].text == model.speech.ask_boxes("It", count, blocks.size)
    assert model.verify(blocks, "it", []) == [] and len(model.mllm.asked) == 1


def test_nothing_agrees_where_nothing_is_believed_to_be():
    assert posterior([(), (), ()], [RED]) == [YesNo(0, 1)]


def test_settings_overrule_the_checkpoint(blocks, truth):
    asked = TruthfulMllm(truth, certainty=0.8)
    model = Sam4MLLM(asked, ColourSegmenter())
    assert model.verification == "question"
    assert model.verify(blocks, "the red block", [RED]) == [YesNo(0.8, pytest.approx(0.2))]
    assert asked.said[-1].startswith("Does the region")
    drawn = replace(model, settings=Settings(verification="posterior"))
    (answer,) = drawn.verify(blocks, "the red block", [RED])
    assert answer.p_yes == pytest.approx(26 / 32)  # .8 of 32, rounded
    assert not asked.said[-1].startswith("Does the region")
    scripted = ScriptedMllm([], [[YesNo(0.3, 0.6)]], notes=POSTERIOR)
    model = Sam4MLLM(scripted, ColourSegmenter(), Settings(verification="question"))
    assert model.verify(blocks, "x", [RED]) == [YesNo(0.3, 0.6)]


def test_an_mllm_that_cannot_sample_says_so(blocks):
    model = Sam4MLLM(ScriptedMllm([], notes=POSTERIOR), ColourSegmenter())
    with pytest.raises(InputError, match="cannot sample") as caught:
        model.verify(blocks, "x", [RED])
    assert "verification='question'" in (caught.value.hint or "")


def test_the_box_that_most_answers_agree_with_is_taken(blocks, truth, tmp_path):
    """The likeliest single answer is wrong; more answers lie around the other box."""
    near = "[340,125,950,380]"
    settings = Settings(strategy="box_only", verified_boxes=2)
    model = over({BLUE_TEXT: 9, RED_TEXT: 8, near: 8, NONE: 7}, [BLUE_TEXT, RED_TEXT], settings)
    found = model.segment(blocks, "it", count="1")
    assert found.objects[0].mask == truth["the red block"][0]
    trace = Trace.load(found.trace.save(tmp_path / "run.json"))
    assert [one.kind for one in trace.exchanges] == ["alternates", "sample"]
    again = replay(trace, blocks, ColourSegmenter())
    assert again.objects[0].located == found.objects[0].located
    said = trace.conversation()[-1]["text"].split("\n")
    assert said[0] == f"{BLUE_TEXT} (9 of 32)" and len(said) == 4


def test_candidates_are_judged_by_their_boxes_and_points_follow(blocks, truth):
    mllm = TruthfulMllm(truth, notes=POSTERIOR)
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy="propose"))
    found = model.segment(blocks, "the red block")
    assert [one.mask for one in found.objects] == truth["the red block"]
    assert [one.box for one in found.objects[0].located.alternates] == [BLUE]
    assert len(found.objects[0].points) == 9
    asked = [text for text in mllm.said if text.startswith("Check if")]
    assert len(asked) == 1, "only of the box that is meant"


def test_the_tool_names_each_thing_that_is_meant_once(blocks_file, truth):
    box = Toolbox(Sam4MLLM(TruthfulMllm(truth, notes=POSTERIOR), ColourSegmenter()))
    arguments = {"image": str(blocks_file), "phrase": "all blocks"}
    assert box.call("propose_objects", arguments).result.meant == []
    output = box.call("propose_objects", {**arguments, "expression": "the blue block"}).result
    (meant,) = output.meant
    assert next(o.box for o in output.candidates if o.object_id == meant) == list(BLUE)
    assert sorted(o.is_meant for o in output.candidates) == pytest.approx([0, 31 / 32], abs=1e-4)


def test_the_embedded_model_knows_true_boxes_from_others(embedded_model):
    """Drawn scenes that no training saw; look-alikes, so that only the expression tells."""
    assert embedded_model.verification == "posterior"
    true, other = [], []
    for index in range(8):
        scene = render_scene(LOOK_ALIKE_WORLD, "test", index, 960)
        boxes = [Box(*one.box) for one in scene.objects]
        asked = [e for e in expressions(scene, random.Random(index)) if len(e.targets) == 1]
        if not asked or len(boxes) < 2:
            continue
        (target,) = asked[0].targets
        image = RgbImage.from_pil(scene.image)
        found = embedded_model.verify(image, asked[0].text, boxes)
        for number, (box, answer) in enumerate(zip(boxes, found, strict=True)):
            if number == target:
                true.append(answer.p_yes)
            elif box_iou(box, boxes[target]) < 0.4:
                other.append(answer.p_yes)
    assert len(true) >= 4 and len(other) >= 3
    assert sum(true) / len(true) > sum(other) / len(other) + 0.4
