"""The claims benchmark: counterfactual labels, looser boxes, thresholds of other seeds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.claims import THRESHOLDS, _over, choose_thresholds
from benchmarks.counterfactuals import RULES, LooseBoxes, relabelled, thresholded
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import judge, outcome_of
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.training.candidates import jittered
from sam4mllm_tool.types import Mask, PointLabel


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
