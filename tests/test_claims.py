"""The claims benchmark: counterfactual labels, looser boxes, thresholds of other seeds."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import pytest

from benchmarks.claims import (
    AGAINST,
    MAIN,
    SETTINGS,
    THRESHOLDS,
    _answer,
    _over,
    as_markdown,
    choose_thresholds,
    compare,
)
from benchmarks.counterfactuals import RULES, LooseBoxes, relabelled, thresholded
from benchmarks.memory import Memory, RememberingMllm, RememberingSegmenter
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import judge, outcome_of
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.training.candidates import jittered
from sam4mllm_tool.types import Box, Mask, PointLabel, PromptPoint


@pytest.fixture
def case(blocks, truth):
    (red,), (_, blue) = truth["the red block"], truth["all blocks"]
    return Case(
        "0", "a", "the red block", lambda: blocks, lambda: [red], (red.box,),
        others=lambda: [blue],
    )  # fmt: skip


def test_looser_boxes_are_the_same_for_every_setting(blocks, truth):
    model = LooseBoxes(TruthfulMllm(truth), ColourSegmenter(), share=0.25)
    exact = replace(model, share=0.0).locate(blocks, "the red block").objects[0].box
    rng = random.Random(f"{blocks.digest}/the red block")
    expected = jittered(exact, 0.25, blocks.size, rng)
    assert expected != exact
    for strategy in ("pqpp", "box_only", "adaptive"):
        found = replace(model, settings=Settings(strategy=strategy)).segment(
            blocks, "the red block"
        )
        assert found.objects[0].located.box == expected
    written = model.speech.write_boxes([expected], blocks.size)
    assert model.locate(blocks, "the red block").dialogue[-1].text == written


def test_labels_that_are_corrected_are_those_that_are_meant(blocks, case, truth):
    """Answers that are all wrong, seen through each rule."""
    liar = TruthfulMllm({"the red block": [Mask(~case.truth()[0].pixels)]})
    box = case.boxes[0]
    model = LooseBoxes(liar, ColourSegmenter())
    points = model.check_points(blocks, model.stated(blocks, "the red block", box), box)
    assert {p.label for p in points} == {PointLabel.BACKGROUND}
    said, true = PointLabel.FOREGROUND, PointLabel.BACKGROUND
    seen = {
        name: [rule(place, said, true) for place in ("other", "outline", "target")]
        for name, rule in RULES.items()
    }
    undecided = PointLabel.UNDECIDED
    assert seen == {
        "neighbours corrected": [true, said, said],
        "edges corrected": [said, true, said],
        "wrong answers dropped": [undecided] * 3,
        "all true": [true] * 3,
    }
    assert RULES["wrong answers dropped"]("target", true, true) is true


def test_true_labels_give_the_mask_of_a_truthful_model(blocks, case, truth):
    model = LooseBoxes(TruthfulMllm(truth, certainty=0.6), ColourSegmenter())
    unsure = model.segment(blocks, case.expression)
    assert all(p.label is PointLabel.UNDECIDED for p in unsure.objects[0].points)
    found = dict(relabelled(model, blocks, case, unsure))
    assert found["all true"].iou == 1
    assert found["all true"].image == "a"
    looser = thresholded(model, blocks, case, unsure, Thresholds(0.5, 0.5))
    assert looser.iou == 1
    judged = judge(model, case, blocks).outcome
    assert replace(judged, seconds=0.0) == outcome_of(unsure, case)


def test_thresholds_are_chosen_on_the_other_seeds():
    """Seed 1 likes the first pair, the others the last: seed 1 gets the last all the same."""
    good, bad = (90, 100, 90), (10, 100, 90)

    def outcomes(pair):
        likes = {1: THRESHOLDS[0], 2: THRESHOLDS[-1], 3: THRESHOLDS[-1], 4: THRESHOLDS[-1]}
        return [(seed, Outcome("c", "i", *(good if likes[seed] == pair else bad)))
                for seed in likes]  # fmt: skip

    found = {_over(pair): outcomes(pair) for pair in THRESHOLDS}
    chosen = dict(choose_thresholds(found, [1, 2, 3, 4]))
    assert [chosen[seed].intersection for seed in (1, 2, 3, 4)] == [10, 90, 90, 90]


# -- settings share what they ask alike ------------------------------------------------------------


def remembering(mllm, memory):
    segmenter = ColourSegmenter()
    model = LooseBoxes(RememberingMllm(mllm, memory), RememberingSegmenter(segmenter, memory))
    return model, segmenter


def test_settings_share_work_and_find_what_they_find_alone(blocks, case, truth):
    mllm, memory = TruthfulMllm(truth, certainty=0.8), Memory()
    model, segmenter = remembering(mllm, memory)
    case = replace(case, ask_presence=False)
    found = dict(_answer(model, memory, case))
    assert set(SETTINGS) < set(found) and _over(THRESHOLDS[0]) in found
    assert len(mllm.said) == len(set(mllm.said)), "each question is asked once"
    shown = [
        (one.box, tuple(p for p in one.points if p.label is not PointLabel.UNDECIDED))
        for one in segmenter.prompts
    ]
    assert len(shown) == len(set(shown)), "each prompt is drawn once"
    for name, settings in SETTINGS.items():
        alone = LooseBoxes(TruthfulMllm(truth, certainty=0.8), ColourSegmenter(), settings)
        outcome = judge(alone, case, blocks).outcome
        assert replace(found[name], seconds=0.0) == replace(outcome, seconds=0.0)


def test_answers_from_memory_count_with_the_time_they_took(blocks, truth, monkeypatch):
    """By a clock that moves on by a second when it is looked at, each call takes one second."""
    ticks = count()
    monkeypatch.setattr("benchmarks.memory.perf_counter", lambda: next(ticks))
    memory = Memory()
    model, segmenter = remembering(TruthfulMllm(truth), memory)
    model.locate(blocks, "the red block")
    assert memory.saved == 0
    model.locate(blocks, "the red block")
    assert memory.saved == pytest.approx(1)
    box = Box(70, 15, 190, 45)
    known, new = SegmentPrompt(box), SegmentPrompt(Box(70, 15, 150, 45))
    model.draw(blocks, [known])
    first, second = model.draw(blocks, [new, known])
    assert (first.mask.area, second.mask.area) == (80 * 30, 120 * 30)
    assert memory.saved == pytest.approx(2) and segmenter.prompts == [known, new]
    memory.forget()
    model.draw(blocks, [known])
    assert memory.saved == 0 and segmenter.prompts == [known, new, known]


def test_only_what_sam_sees_of_a_prompt_is_compared(blocks, truth):
    model, segmenter = remembering(TruthfulMllm(truth), Memory())
    box = Box(70, 15, 190, 45)

    def draw(label):
        model.draw(blocks, [SegmentPrompt(box, (PromptPoint(80, 20, label),))])
        return len(segmenter.prompts)

    assert draw(PointLabel.UNDECIDED) == 1
    model.draw(blocks, [SegmentPrompt(box)])
    assert len(segmenter.prompts) == 1, "an undecided point is not shown"
    assert draw(PointLabel.FOREGROUND) == 2
    assert draw(PointLabel.BACKGROUND) == 3
    logits = model.draw(blocks, [SegmentPrompt(box)])[0].logits
    model.draw(blocks, [SegmentPrompt(box, mask_logits=logits)])
    assert len(segmenter.prompts) == 4


def test_rows_are_compared_with_the_box_alone_and_with_pqpp():
    def outcomes(intersection):
        return [(seed, Outcome("c", f"i{n}", intersection, 100, 90))
                for seed in (1, 2) for n in (1,)]  # fmt: skip

    found = {"box only": outcomes(80), MAIN: outcomes(90), "adaptive, up to 5": outcomes(85)}
    rows = {row["setting"]: row for row in compare(found)}
    box, pqpp, adaptive = (80 / 110, 90 / 100, 85 / 105)
    assert rows["adaptive, up to 5"]["against_box_only"]["value"] == pytest.approx(adaptive - box)
    assert rows["adaptive, up to 5"]["against_pqpp"]["value"] == pytest.approx(adaptive - pqpp)
    head, _, *lines = as_markdown(list(rows.values())).splitlines()
    assert all(f"− {name}" in head for name in AGAINST.values())
    assert lines[0].startswith("| box only | 0.727 ") and "|  | -0.173 (" in lines[0]
    assert "| +0.173 (+0.173 … +0.173) |  |" in lines[1]
