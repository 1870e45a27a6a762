"""Traces: what was said, what was recorded, and what a replay needs."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.model import Sam4MLLM, replay
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.strategies import BoxOnly, Pqpp
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.protocols import CheckpointNotes, Reply
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.types import Box, TargetCount, YesNo

RED_BOX, BLUE_BOX = "[350,125,950,375]", "[050,450,250,950]"
PPG = f"{RED_BOX} (400,200) (600,300) (900,250) (100,700)"


@dataclass
class GrammarMllm(ScriptedMllm):
    """Scripted; keeps every call whole."""

    calls: list = field(default_factory=list)

    def generate(self, image, dialogue, *, grammar=None, max_new_tokens=256):
        self.calls.append((image, dialogue, grammar))
        return Reply(self.replies.pop(0), -0.5, 5)

    def alternates(self, image, dialogue, *, grammar, count):
        self.calls.append((image, dialogue, grammar))
        return [Reply(text, -0.5, 5) for text in self.replies[:count]]

    def answer_yes_no(self, image, dialogue, *, words, count):
        self.calls.append((image, dialogue, None))
        return self.answers.pop(0)


def test_each_turn_is_told_once_in_its_order(blocks):
    answers = [[YesNo(0.9, 0.05), YesNo(0.1, 0.8)], [YesNo(0.3, 0.3), YesNo(0.1, 0.8)]]
    notes = CheckpointNotes(points_per_question=2)
    mllm = ScriptedMllm([RED_BOX], answers, notes=notes)
    found = Sam4MLLM(mllm, ColourSegmenter(), Settings(points=4)).segment(blocks, "it")
    said = found.trace.conversation()
    assert [turn["role"] for turn in said] == [
        "system", "user", "assistant", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert said[2]["text"] == RED_BOX
    assert (said[4]["text"], said[6]["text"]) == ("YesNo", "YesNo")  # evenly matched reads as yes
    assert said[3]["text"] != said[5]["text"]
    assert found.trace.questions == 3


def test_page_data_holds_what_the_page_draws_and_no_raw_exchange(model, blocks):
    trace = model.segment(blocks, "the red block").trace
    data = trace.page_data()
    assert data["dialogue"] == trace.conversation()
    (event,) = data["events"]
    assert event["kind"] == "mask" and event["detail"]["prompts"][0]["box"] == [70, 15, 190, 45]
    assert len(event["detail"]["prompts"][0]["points"]) == 9
    assert event["detail"]["prompts"][0]["former_mask"] is False
    assert not {"exchanges", "mask_calls"} & set(data)


def test_text_beyond_ascii_survives_the_file(blocks, tmp_path):
    mllm = TruthfulMllm({})
    trace = Sam4MLLM(mllm, ColourSegmenter()).segment(blocks, "红色方块 – röt").trace
    path = trace.save(tmp_path / "t.json")
    assert "红色方块 – röt" in path.read_bytes().decode("utf-8")
    assert Trace.load(path) == trace
    for content in ("{}", "not json"):
        path.write_text(content)
        with pytest.raises(InputError, match="is not a trace"):
            Trace.load(path)


def test_alternates_are_recorded_and_replayed(blocks):
    answers = [[YesNo(0.1, 0.9)], [YesNo(0.8, 0.1)]]
    mllm = GrammarMllm([BLUE_BOX, RED_BOX], answers)
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy="box_only", verified_boxes=2))
    found = model.segment(blocks, "it", count="1")
    image, dialogue, grammar = mllm.calls[0]
    assert image == blocks and grammar == model.speech.box_grammar(TargetCount.ONE)
    assert dialogue[-1].text == model.speech.ask_boxes("it", TargetCount.ONE, blocks.size)
    first = found.trace.exchanges[0]
    assert (first.kind, first.count) == ("alternates", 2)
    assert first.replies == [(BLUE_BOX, -0.5, 5), (RED_BOX, -0.5, 5)]
    spoken = found.location.dialogue
    assert [turn.role for turn in spoken] == ["system", "user", "assistant"]
    assert spoken[-1].text == RED_BOX
    again = replay(found.trace, blocks, ColourSegmenter())
    assert again.objects[0].located == found.objects[0].located
    assert again.trace.models["mllm"] == "scripted"


@pytest.mark.parametrize("count", list(TargetCount))
def test_a_ppg_question_names_expression_count_and_points_under_its_grammar(blocks, count):
    mllm = GrammarMllm([PPG], notes=CheckpointNotes(lower_case=True, caution="toys"))
    model = Sam4MLLM(mllm, ColourSegmenter())
    location = model.locate_with_points(blocks, "The Red", count)
    ((image, dialogue, grammar),) = mllm.calls
    speech = model.speech
    assert image == blocks
    assert dialogue[-1].text == speech.ask_box_and_points("the red", count, 3, 1, blocks.size)
    assert grammar == speech.box_and_points_grammar(count, 3, 1)
    assert grammar != speech.box_and_points_grammar(count, 1, 1)
    assert [turn.role for turn in location.dialogue] == ["system", "user", "assistant"]
    assert location.dialogue[-1].text == PPG
    assert (location.expression, location.count) == ("The Red", count)
    assert location.notes == ("toys",)
    assert location.objects[0].alternates == ()
    assert location.objects[0].likelihood == pytest.approx(np.exp(-0.1))


def test_a_stated_location_reads_as_if_the_model_had_answered(blocks):
    model = Sam4MLLM(ScriptedMllm([]), ColourSegmenter())
    location = model.stated(blocks, "it", Box(70, 15, 190, 45))
    assert (location.expression, location.count) == ("it", TargetCount.ONE)
    assert [one.box for one in location.objects] == [Box(70, 15, 190, 45)]
    assert [turn.role for turn in location.dialogue] == ["system", "user", "assistant"]
    assert location.dialogue[-1].text == RED_BOX


def test_marks_are_asked_about_in_lists_of_their_own(blocks):
    answers = [[YesNo(0.9, 0.05)] * 2, [YesNo(0.01, 0.95)] * 2]
    mllm = GrammarMllm([RED_BOX], answers, notes=CheckpointNotes(points_per_question=2))
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(points=4, point_asking="marks"))
    found = model.segment(blocks, "it")
    (_, (marked, first, _), (same, second, _)) = mllm.calls
    assert marked == same != blocks
    assert first[-1].text == model.speech.ask_marks("it", [1, 2])
    assert second[-1].text == model.speech.ask_marks("it", [3, 4])
    labels = [point.label.value for point in found.objects[0].points]
    assert labels == ["foreground"] * 2 + ["background"] * 2


@pytest.mark.parametrize("strategy", ["box_only", "pqpp", "adaptive", "ppg"])
def test_the_count_reaches_the_question_of_every_strategy(blocks, strategy):
    mllm = GrammarMllm([PPG if strategy == "ppg" else RED_BOX], [[YesNo(0.97, 0.01)] * 9])
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy=strategy))
    model.segment(blocks, "it", count="1+")
    assert "describes (1+):" in mllm.calls[0][1][-1].text


@dataclass(frozen=True)
class Renamed(BoxOnly):
    """A strategy that is not built in."""

    name: str = "mine"


def test_a_replay_uses_the_recorded_strategy_count_and_format_unless_others_are_given(
    model, blocks
):
    plain = replace(model, settings=Settings(strategy="pqpp"))
    trace = plain.segment(blocks, "all blocks", count="1+", strategy="box_only").trace
    again = replay(trace, blocks, ColourSegmenter())
    assert (again.trace.strategy, again.trace.count) == ("box_only", "1+")
    assert again.trace.settings["format"] == "sam4mllm"
    assert [o.points for o in again.objects] == [(), ()]
    mine = plain.segment(blocks, "the red block", strategy=Renamed()).trace
    with pytest.raises(InputError, match="made with the strategy 'mine'") as caught:
        replay(mine, blocks, ColourSegmenter())
    assert "replay(strategy=" in caught.value.hint
    assert replay(mine, blocks, ColourSegmenter(), strategy=Renamed()).trace.strategy == "mine"
    with pytest.raises(InputError, match="does not hold") as caught:
        replay(mine, blocks, ColourSegmenter(), strategy=Pqpp())  # it asks about points as well
    assert caught.value.hint
