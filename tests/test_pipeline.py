"""The flow over truthful stand-ins, planted faults in the replies, and the shipped models."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.errors import (
    DialogueError,
    ExpressionError,
    InputError,
    PointOutsideImage,
    PromptError,
)
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.pipeline.model import Sam4MLLM, replay
from sam4mllm_tool.pipeline.points import Thresholds, grid_points
from sam4mllm_tool.pipeline.reading import nearest_word, read_expression
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.steps import agreement, choose_mask
from sam4mllm_tool.pipeline.strategies import STRATEGIES
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.protocols import CheckpointNotes, MaskCandidate, Reply, SegmentPrompt
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.types import (
    Box,
    Mask,
    Point,
    PointLabel,
    PromptPoint,
    RgbImage,
    Status,
    TargetCount,
    YesNo,
)

ANY = TargetCount.ZERO_OR_MORE


@pytest.mark.parametrize("strategy", ["pqpp", "adaptive", "box_only"])
def test_the_true_mask_comes_out_exactly(model, blocks, truth, strategy):
    model = replace(model, settings=Settings(strategy=strategy))
    found = model.segment(blocks, "the red block")
    assert found.status is Status.FOUND
    assert found.objects[0].mask == truth["the red block"][0]


def test_pqpp_asks_two_rounds_in_the_published_words(model, blocks):
    model.segment(blocks, "the red block")
    first, second = model.mllm.said
    assert first == (
        "Please provide the bounding box coordinate of the region this sentence describes (0+):\n"
        '"the red block".'
    )
    head, points = second.split("\n")
    assert head == (
        "Check if the points listed below are located on the object with bounding box "
        "[350,125,950,375]:"
    )
    assert len(points.split(" ")) == 9


def test_points_decide_what_the_box_cannot(blocks, truth):
    """A ring: the box's centre is background, so only points find the object's colour."""
    pixels = np.array(blocks.pil)
    pixels[22:36, 95:160] = (255, 255, 255)
    image = RgbImage.from_pil(Image.fromarray(pixels))
    ring = Mask((image.array == (214, 40, 40)).all(axis=2))
    mllm = TruthfulMllm({"the ring": [ring]})
    by_box = Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy="box_only"))
    by_points = replace(by_box, settings=Settings(strategy="pqpp"))
    assert by_box.segment(image, "the ring").objects[0].mask != ring
    assert by_points.segment(image, "the ring").objects[0].mask == ring


def test_several_objects_and_none_are_results(model, blocks, truth):
    both = model.segment(blocks, "all blocks", count=TargetCount.ONE_OR_MORE)
    assert [o.mask for o in both.objects] == truth["all blocks"]
    none = model.segment(blocks, "the green block", count=ANY)
    assert none.status is Status.NOT_FOUND
    assert none.objects == ()
    assert len(model.segment(blocks, "all blocks", count="1").objects) == 1


@dataclass
class SeveralAtOnce(TruthfulMllm):
    """Can be asked several questions at once; remembers how many there were each time."""

    asked: list[int] = field(default_factory=list)

    def answer_each(self, questions, *, words):
        self.asked.append(len(questions))
        return [
            self.answer_yes_no(one.image, one.dialogue, words=words, count=one.count)
            for one in questions
        ]


def test_all_points_of_all_objects_are_asked_at_once(blocks, truth):
    notes = CheckpointNotes(points_per_question=4)  # nine points per object: three questions
    together = Sam4MLLM(SeveralAtOnce(truth, notes=notes), ColourSegmenter())
    alone = Sam4MLLM(TruthfulMllm(truth, notes=notes), ColourSegmenter())
    found, expected = (
        side.segment(blocks, "all blocks", count=TargetCount.ONE_OR_MORE)
        for side in (together, alone)
    )
    assert together.mllm.asked == [6]
    assert together.mllm.said == alone.mllm.said
    assert [o.points for o in found.objects] == [o.points for o in expected.objects]
    assert [o.mask for o in found.objects] == truth["all blocks"]
    assert [e.kind for e in found.trace.exchanges] == ["generate", *["yes_no"] * 6]
    assert [e.count for e in found.trace.exchanges[1:]] == [4, 4, 1] * 2


def test_all_boxes_are_verified_at_once(blocks, truth):
    mllm = SeveralAtOnce(truth)
    settings = Settings(strategy="box_only", verified_boxes=3)
    Sam4MLLM(mllm, ColourSegmenter(), settings).segment(blocks, "the red block")
    assert mllm.asked == [2], "the box of the reply and its one alternate"


def test_unsure_answers_are_not_shown_to_the_segmenter(truth, blocks):
    shy = Sam4MLLM(TruthfulMllm(truth, certainty=0.7), ColourSegmenter())
    found = shy.segment(blocks, "the red block")
    assert {p.label for p in found.objects[0].points} == {PointLabel.UNDECIDED}
    bolder = replace(shy, settings=Settings(thresholds=Thresholds(0.6, 0.6)))
    labels = {p.label for p in bolder.segment(blocks, "the red block").objects[0].points}
    assert labels == {PointLabel.FOREGROUND}


def test_ppg_takes_box_and_points_from_one_reply(blocks, truth):
    reply = "[351,126,951,376] (400,200) (600,300) (900,250) (100,700)"
    model = Sam4MLLM(ScriptedMllm([reply]), ColourSegmenter(), Settings(strategy="ppg"))
    found = model.segment(blocks, "the red block")
    labels = [p.label.value for p in found.objects[0].points]
    assert labels == ["foreground"] * 3 + ["background"]
    assert found.objects[0].mask == truth["the red block"][0]
    assert found.trace.questions == 1


def test_alternates_are_other_boxes_with_scores(model, blocks, truth):
    located = model.locate(blocks, "the red block", alternates=2).objects[0]
    assert box_iou(located.alternates[0].box, truth["the blue block"][0].box) > 0.95
    assert 0 < located.alternates[0].likelihood < located.likelihood
    assert located.score is None  # no calibration is known


@pytest.mark.parametrize(
    ("reply", "box", "note"),
    [
        ("[401,751,101,251]", Box(20.2, 30.12, 80.2, 90.12), "swapped"),
        ("[401,251,101,751]", Box(20.2, 30.12, 80.2, 90.12), "swapped"),
        ("[101,751,401,251]", Box(20.2, 30.12, 80.2, 90.12), "swapped"),
        ("[101,251,1401,751]", Box(20.2, 30.12, 199.8, 90.12), "clamped"),
        ("[101,251,401,1000]", Box(20.2, 30.12, 80.2, 119.88), "clamped"),
        ("[101,251,101,251]", Box(20.2, 30.12, 20.4, 30.24), "widened"),
        ("[101,251,401,251]", Box(20.2, 30.12, 80.2, 30.24), "widened"),
        ("[101,251,101,751]", Box(20.2, 30.12, 20.4, 90.12), "widened"),
    ],
)
def test_odd_boxes_are_corrected_with_a_note(blocks, reply, box, note):
    model = Sam4MLLM(ScriptedMllm([reply]), ColourSegmenter())
    location = model.locate(blocks, "x")
    assert location.objects[0].box == pytest.approx(box)
    assert note in location.notes[-1]


@pytest.mark.parametrize("reply", ["", "I see a dog.", "[1,2,3]", "[a,b,c,d]", "[12,13"])
def test_replies_without_a_box_are_dialogue_errors_with_the_reply(blocks, reply):
    model = Sam4MLLM(ScriptedMllm([reply]), ColourSegmenter())
    with pytest.raises(DialogueError) as caught:
        model.segment(blocks, "the red block")
    assert caught.value.raw_reply == reply
    assert caught.value.hint


def test_too_few_ppg_points_are_a_dialogue_error(blocks):
    settings = Settings(strategy="ppg")
    model = Sam4MLLM(ScriptedMllm(["[101,251,401,751] (1,1)"]), ColourSegmenter(), settings)
    with pytest.raises(DialogueError, match="1 points instead of 4"):
        model.segment(blocks, "x")


def test_too_few_answers_are_a_dialogue_error(blocks):
    mllm = ScriptedMllm(["[101,251,401,751]"], [[YesNo(0.9, 0.05)] * 4])
    with pytest.raises(DialogueError, match="4 answers came back for 9 points") as caught:
        Sam4MLLM(mllm, ColourSegmenter()).segment(blocks, "x")
    assert caught.value.raw_reply == "YesYesYesYes"


@pytest.mark.parametrize("expression", ["", "  \n\t ", "x" * 10_000])
def test_empty_and_endless_expressions_are_refused(model, blocks, expression):
    with pytest.raises(ExpressionError) as caught:
        model.segment(blocks, expression)
    assert caught.value.hint


@pytest.mark.parametrize(
    "expression", ['the "red" block', "der röte Block\nим", "红色方块", "<s></s>"]
)
def test_unusual_expressions_are_asked_as_they_are(model, blocks, expression):
    model.locate(blocks, expression, ANY)
    assert " ".join(expression.split()) in model.mllm.said[-1]


@pytest.mark.parametrize(
    ("points", "error"),
    [
        ([Point(float("nan"), 1)], PromptError),
        ([Point(1, float("inf"))], PromptError),
        ([Point(-1, 5)], PointOutsideImage),
        ([Point(200, 5)], PointOutsideImage),
        ([], PromptError),
        ([Point(1, 1)] * 10_000, PromptError),
    ],
)
def test_bad_points_are_refused(model, blocks, points, error):
    location = model.locate(blocks, "the red block")
    with pytest.raises(error):
        model.check_points(blocks, location, location.objects[0].box, points)


def test_the_same_point_is_asked_once_and_answered_everywhere(model, blocks):
    location = model.locate(blocks, "the red block")
    points = [Point(80, 25), Point(25, 80), Point(80, 25)]
    answers = model.check_points(blocks, location, location.objects[0].box, points)
    assert [p.label.value for p in answers] == ["foreground", "background", "foreground"]
    assert model.mllm.said[-1].count("(") == 2


def test_many_points_are_asked_in_several_questions(model, blocks):
    location = model.locate(blocks, "the red block")
    points = [Point(x, 25) for x in range(40, 110)]
    answers = model.check_points(blocks, location, location.objects[0].box, points)
    on = [p.label is PointLabel.FOREGROUND for p in answers]
    assert on == [x >= 70 for x in range(40, 110)]
    assert len(model.mllm.said) == 1 + 3


def test_points_can_be_asked_by_marks_on_a_copy_of_the_picture(blocks):
    answers = [[YesNo(0.9, 0.05)] * 9]
    mllm = ScriptedMllm(["[350,125,950,375]"], answers)
    settings = Settings(point_asking="marks")
    found = Sam4MLLM(mllm, ColourSegmenter(), settings).segment(blocks, "the red block")
    first, second = found.trace.exchanges
    assert first.image == blocks.digest != second.image
    assert second.dialogue[-1][1].endswith("1 2 3 4 5 6 7 8 9")
    assert [p.label for p in found.objects[0].points] == [PointLabel.FOREGROUND] * 9


def test_verification_overrules_a_wrong_first_box(blocks, truth):
    """The model's first box is wrong and its second right; asked to look, it sees that."""
    wrong, right = "[050,450,250,950]", "[350,125,950,375]"
    mllm = ScriptedMllm([wrong, right], [[YesNo(0.1, 0.9)], [YesNo(0.8, 0.1)]])
    settings = Settings(strategy="box_only", verified_boxes=2)
    found = Sam4MLLM(mllm, ColourSegmenter(), settings).segment(blocks, "the red block")
    assert found.objects[0].mask == truth["the red block"][0]
    assert found.location.dialogue[-1].text == right
    assert found.trace.questions == 3


def test_mask_choice_by_agreement_overrules_a_wrong_estimate():
    def candidate(columns, predicted_iou):
        pixels = np.zeros((4, 8), dtype=bool)
        pixels[:, :columns] = True
        return MaskCandidate(Mask(pixels), np.zeros((4, 8), np.float32), predicted_iou)

    wide, narrow = candidate(8, 0.8), candidate(4, 0.6)
    points = [PromptPoint(6, 1, PointLabel.BACKGROUND), PromptPoint(1, 1, PointLabel.FOREGROUND)]
    assert choose_mask([wide, narrow], points) is wide
    assert choose_mask([wide, narrow], points, "agreement") is narrow
    assert choose_mask([wide, narrow], (), "agreement") is wide


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_saved_trace_replays_to_the_same_masks(embedded_model, demo_image, tmp_path, strategy):
    model = replace(embedded_model, settings=Settings(strategy=strategy))
    image, expression = demo_image
    found = model.segment(image, expression)
    saved = Trace.load(found.trace.save(tmp_path / "trace.json"))
    assert saved == found.trace
    again = replay(saved, image, model.segmenter)
    for one, other in zip(again.objects, found.objects, strict=True):
        # Drawn twice: the last place of a logit may differ.
        assert mask_iou(one.mask, other.mask) > 0.99
        assert one.drawn.predicted_iou == pytest.approx(other.drawn.predicted_iou, abs=1e-4)
        assert (one.located, one.points) == (other.located, other.points)


def test_a_trace_is_saved_as_its_extension_says(model, blocks, tmp_path):
    trace = model.segment(blocks, "the red block").trace
    page = trace.save(tmp_path / "trace.HTML", blocks).read_text()
    assert page.lstrip().startswith("<!doctype html>")
    for name, image in (("trace.html", None), ("trace.txt", blocks), ("trace", blocks)):
        with pytest.raises(InputError) as caught:
            trace.save(tmp_path / name, image)
        assert caught.value.hint
        assert not (tmp_path / name).exists()


def test_capitals_are_folded_where_only_lower_case_was_taught(blocks, truth):
    mllm = TruthfulMllm(truth, notes=CheckpointNotes(lower_case=True))
    model = Sam4MLLM(mllm, ColourSegmenter())
    found = model.segment(blocks, "The RED Block")
    assert found.objects[0].mask == truth["the red block"][0]
    assert model.verify(blocks, "The Red Block", [found.objects[0].located.box])[0].p_yes > 0.9
    assert (
        model.stated(blocks, "The Red Block", Box(1, 2, 3, 4))
        .dialogue[-2]
        .text.endswith('"the red block".')
    )
    assert not any("R" in asked or "B" in asked for asked in mllm.said[2:])
    as_they_are = Sam4MLLM(TruthfulMllm(truth), ColourSegmenter())
    assert as_they_are.segment(blocks, "The RED Block", count=ANY).status is Status.NOT_FOUND


TAUGHT = frozenset(
    (
        "a",
        "the",
        "red",
        "green",
        "block",
        "right",
        "umbrella",
        "umbrellas",
        "apple",
        "apples",
        "isn",
    )
)


@pytest.mark.parametrize(
    ("text", "read", "notes"),
    (
        ("The gren umbrela", "the green umbrella",
         ('read "gren" as "green"', 'read "umbrela" as "umbrella"')),
        ("the umbrelas, an appel", "the umbrellas, an apple",
         ('read "umbrelas" as "umbrellas"', 'read "appel" as "apple"',
          "the model was not taught these words and may guess: an")),
        ("the light rad block 12", "the light rad block 12",
         ("the model was not taught these words and may guess: light, rad",)),
        ("the apple's block isn't red", "the apple's block isn't red", ()),
    ),
)  # fmt: skip
def test_misspelt_words_are_corrected_where_the_words_are_few(text, read, notes):
    """Short words, and words that are near to a known one but begin otherwise, stay as they are."""
    found = read_expression(text, CheckpointNotes(vocabulary=TAUGHT, lower_case=True))
    assert (found.text, found.notes) == (read, notes)


def test_ambiguous_spelling_is_left_alone():
    for words, found in (({"stars"}, "stars"), ({"stars", "start"}, None)):
        assert nearest_word("starx", words) is None  # 4 of 5 letters
        assert nearest_word("starst", words) == found


def test_a_misspelt_word_is_asked_as_it_was_read(blocks, truth):
    notes = CheckpointNotes(vocabulary=TAUGHT, lower_case=True)
    found = Sam4MLLM(TruthfulMllm(truth, notes=notes), ColourSegmenter()).segment(
        blocks, "the red blok"
    )
    assert found.objects[0].mask == truth["the red block"][0]
    assert 'read "blok" as "block"' in found.notes
    kept = TruthfulMllm(truth, notes=notes.model_copy(update={"correct_spelling": False}))
    found = Sam4MLLM(kept, ColourSegmenter()).segment(blocks, "the red blok", count=ANY)
    assert found.status is Status.NOT_FOUND and "may guess: blok" in found.notes[0]


def test_lists_are_no_longer_than_what_was_taught(blocks, truth):
    mllm = TruthfulMllm(truth, notes=CheckpointNotes(points_per_question=4))
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(points=9))
    found = model.segment(blocks, "the red block")
    asked = [text for text in mllm.said if text.startswith("Check")]
    assert [text.count("(") for text in asked] == [4, 4, 1]
    whole = Sam4MLLM(TruthfulMllm(truth), ColourSegmenter(), Settings(points=9))
    assert found.objects[0].points == whole.segment(blocks, "the red block").objects[0].points
    again = replay(found.trace, blocks, model.segmenter)
    assert [o.mask for o in again.objects] == [o.mask for o in found.objects]
    assert again.objects[0].points == found.objects[0].points


def test_a_trace_does_not_answer_other_questions(model, blocks):
    trace = model.segment(blocks, "the red block").trace
    trace.exchanges[0].dialogue[-1] = ("user", "something else")
    with pytest.raises(InputError, match="does not hold"):
        replay(trace, blocks, model.segmenter)


def test_words_the_small_model_was_not_taught_are_noted(embedded_model, demo_image):
    location = embedded_model.locate(demo_image[0], "the iridescent zeppelin")
    assert "iridescent, zeppelin" in location.notes[-1]
    assert "the," not in location.notes[-1]


def test_the_shipped_models_run_the_whole_dialogue(embedded_model, demo_image):
    image, expression = demo_image
    found = embedded_model.segment(image, expression)
    assert found.status is Status.FOUND
    (one,) = found.objects
    assert len(one.points) == 9
    for point in one.points:
        assert 0 <= point.p_yes + point.p_no <= 1 + 1e-6
    assert one.mask.pixels.shape == (image.height, image.width)
    assert set(found.trace.timings) == {"locate", "points", "image embedding", "mask"}


def test_scripted_answers_count_by_threshold(blocks):
    answers = [YesNo(0.9, 0.05)] * 4 + [YesNo(0.02, 0.95)] * 4 + [YesNo(0.4, 0.5)]
    model = Sam4MLLM(ScriptedMllm(["[101,251,401,751]"], [answers]), ColourSegmenter())
    points = model.segment(blocks, "x").objects[0].points
    labels = [p.label.value for p in points]
    assert labels == ["foreground"] * 4 + ["background"] * 4 + ["undecided"]


def test_boxes_that_reach_beyond_the_picture_are_clipped_before_they_are_drawn(model, blocks):
    model.draw(blocks, [SegmentPrompt(Box(150, -10, 260, 70)), SegmentPrompt(Box(-5, 60, 40, 900))])
    drawn_from = [prompt.box for prompt in model.segmenter.prompts]
    assert drawn_from == [Box(150, 0, 200, 70), Box(0, 60, 40, 120)]
    model.draw(blocks, [SegmentPrompt(None, (PromptPoint(80, 25, PointLabel.FOREGROUND),))])
    assert model.segmenter.prompts[-1].box is None


def test_candidate_points_lie_in_the_visible_part_of_the_box(model, blocks):
    visible = Box(150, 0, 200, 70)
    for spread in ("grid", "poisson", "jittered"):
        some = replace(model, settings=Settings(candidates=spread, points=7))
        points = some.candidate_points(Box(150, -10, 260, 70), blocks)
        assert len(points) == len(set(points)) == 7
        assert all(visible.x_min < x < visible.x_max for x, _ in points)
        assert all(visible.y_min < y < visible.y_max for _, y in points)
        assert points == some.candidate_points(Box(150, -10, 260, 70), blocks)
    jittered = some.candidate_points(visible, blocks)
    poisson = replace(model, settings=Settings(candidates="poisson", points=7))
    assert model.candidate_points(visible, blocks)[:2] == [
        Point(150 + 50 / 6, 70 / 6), Point(175, 70 / 6)
    ]  # fmt: skip
    assert jittered != poisson.candidate_points(visible, blocks)


def test_a_likelihood_is_the_geometric_mean_over_the_replys_tokens(model, blocks):
    # The stand-in says -0.1 over 4 tokens, and -3 over 4 for the others.
    (one,) = model.locate(blocks, "the red block", alternates=1).objects
    assert one.likelihood == pytest.approx(math.exp(-0.1 / 4))
    assert [other.likelihood for other in one.alternates] == [pytest.approx(math.exp(-3 / 4))]
    scripted = Sam4MLLM(ScriptedMllm(["[351,126,951,376]"]), ColourSegmenter())
    (one,) = scripted.locate(blocks, "x").objects
    assert one.score is None and one.likelihood is None


def test_no_more_alternates_than_asked_for_and_never_the_box_itself(model, blocks):
    for count in (0, 1, 2, 5):
        (one,) = model.locate(blocks, "the red block", alternates=count).objects
        assert len(one.alternates) == min(count, 1)
        assert one.box not in [other.box for other in one.alternates]


def test_further_boxes_where_one_was_asked_for_are_alternates(blocks):
    reply = "[351,126,951,376] [050,450,250,950] [010,020,030,040]"
    model = Sam4MLLM(ScriptedMllm([reply, reply]), ColourSegmenter())
    (one,) = model.locate(blocks, "x", "1").objects
    assert [other.box for other in one.alternates] == [
        pytest.approx((10, 54, 50, 114)),
        pytest.approx((2, 2.4, 6, 4.8)),
    ]
    assert len(model.locate(blocks, "x", "1+").objects) == 3


def test_ppg_keeps_one_object_where_one_was_asked_for(blocks):
    one = "[351,126,951,376] (400,200) (600,300) (900,250) (100,700)"
    other = "[050,450,250,950] (100,500) (100,600) (200,700) (900,200)"
    settings = Settings(strategy="ppg")
    model = Sam4MLLM(ScriptedMllm([f"{one} {other}"] * 2), ColourSegmenter(), settings)
    assert len(model.segment(blocks, "x", count="1").objects) == 1
    both = model.segment(blocks, "x", count="1+").objects
    assert [round(found.located.box.x_min, 1) for found in both] == [70.2, 10]
    assert both[1].points[0] == PromptPoint(20, 60, PointLabel.FOREGROUND)


@dataclass
class RankingMllm(ScriptedMllm):
    """Offers the stated boxes with scores, best first."""

    def alternates(self, image, dialogue, *, grammar, count):
        offered = [Reply(text, -0.4 * n, 4) for n, text in enumerate(self.replies, 1)]
        return offered[:count]


def test_verified_boxes_are_ranked_by_their_answers_and_keep_their_scores(blocks):
    replies = ["[050,450,250,950]", "[010,020,030,040]", "[350,125,950,375]"]
    answers = [[YesNo(0.2, 0.7)], [YesNo(0.1, 0.8)], [YesNo(0.6, 0.3)]]
    notes = CheckpointNotes(box_calibration=(1, 0))  # the score is then l / (1 + l)
    mllm = RankingMllm(replies, answers, notes=notes)
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(verified_boxes=3))
    (one,) = model.locate(blocks, "x").objects
    assert one.box == pytest.approx((70, 15, 190, 45))
    assert one.likelihood == pytest.approx(math.exp(-0.3))
    assert one.score == pytest.approx(math.exp(-0.3) / (1 + math.exp(-0.3)))
    assert [other.box.x_min for other in one.alternates] == pytest.approx([10, 2])
    likelihoods = [other.likelihood for other in one.alternates]
    assert likelihoods == pytest.approx([math.exp(-0.1), math.exp(-0.2)])
    scores = [other.score for other in one.alternates]
    assert scores == pytest.approx([one / (1 + one) for one in likelihoods])


# -- adaptive: where it asks, and when it stops ----------------------------------------------------

PALE, DARK = (214, 60, 40), (114, 40, 40)  # 20 and 100 from RED: only some of SAM's masks have them
PATCHES = {(74, 19, 20, 20): PALE, (150, 17, 26, 24): DARK}  # x, y, width, height


@pytest.fixture
def patched():
    """The red block with two patches of other shades."""
    pixels = np.full((120, 200, 3), 255, np.uint8)
    pixels[15:45, 70:190] = (214, 40, 40)
    for (x, y, width, height), shade in PATCHES.items():
        pixels[y : y + height, x : x + width] = shade
    return RgbImage.from_pil(Image.fromarray(pixels))


def without(image, *shades):
    """The mask of what is neither white nor one of the shades."""
    parts = [(image.array == shade).all(axis=2) for shade in ((255, 255, 255), *shades)]
    return Mask(~np.logical_or.reduce(parts))


def adaptive(mllm, **settings):
    return Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy="adaptive", **settings))


def asked(model, image, expression="it"):
    """The points of each question, and the object found."""
    found = model.segment(image, expression)
    (one,) = found.objects
    sizes = [e.count for e in found.trace.exchanges if e.kind == "yes_no"]
    return sizes, one


def test_adaptive_asks_about_candidates_well_inside_the_mask_only(patched):
    model = adaptive(TruthfulMllm({"it": [without(patched)]}), points=16)
    sizes, one = asked(model, patched)
    (first,) = model.segmenter.predict(patched, [SegmentPrompt(one.located.box)])
    mask = max(first, key=lambda drawn: drawn.predicted_iou).mask
    rows, columns = np.nonzero(~np.pad(mask.pixels, 1))
    grid = grid_points(one.located.box, 16)
    depths = [np.hypot(int(p.y) + 1 - rows, int(p.x) + 1 - columns).min() for p in grid]
    wanted = [p for p, depth in zip(grid, depths, strict=True) if depth >= 0.03 * math.sqrt(3600)]
    assert [Point(p.x, p.y) for p in one.points] == wanted
    assert sizes == [len(wanted)] and 0 < len(wanted) < 16


def test_adaptive_keeps_the_mask_that_no_answer_contradicts(patched):
    truth = without(patched, DARK)  # what SAM draws for the box
    model = adaptive(TruthfulMllm({"it": [truth]}))
    sizes, one = asked(model, patched)
    assert len(sizes) == 1 and one.points
    assert [prompt.points for prompt in model.segmenter.prompts] == [()]
    assert (one.mask.pixels == truth.pixels).all()


def test_adaptive_draws_again_with_all_answers_where_one_contradicts(patched):
    truth = without(patched, PALE, DARK)
    model = adaptive(TruthfulMllm({"it": [truth]}), points=16)
    _, one = asked(model, patched)
    labels = {p.label for p in one.points}
    assert labels == {PointLabel.FOREGROUND, PointLabel.BACKGROUND}
    assert [prompt.points for prompt in model.segmenter.prompts] == [(), one.points]
    (again,) = ColourSegmenter().predict(patched, [SegmentPrompt(one.located.box, one.points)])
    assert one.drawn.predicted_iou == max(drawn.predicted_iou for drawn in again)
    assert (one.mask.pixels == again[1].mask.pixels).all()  # the best of the three
    assert not one.mask.contains(80, 30), "the pale patch, which the first mask held"


def test_adaptive_asks_about_all_objects_at_once_and_redraws_the_doubted_ones(blocks):
    yes, no = YesNo(0.97, 0.01), YesNo(0.01, 0.97)
    mllm = ScriptedMllm(["[350,125,950,375] [100,500,300,900]"], [[yes] * 9, [no] * 6])
    model = adaptive(mllm)
    found = model.segment(blocks, "the blocks", count="1+")
    sure, doubted = found.objects
    assert (len(sure.points), len(doubted.points)) == (9, 6)
    prompts = model.segmenter.prompts
    assert [(p.box, p.points) for p in prompts] == [
        (sure.located.box, ()), (doubted.located.box, ()), (doubted.located.box, doubted.points),
    ]  # fmt: skip
    kept, _ = (ColourSegmenter().predict(blocks, [p])[0][1].mask for p in prompts[:2])
    assert (sure.mask.pixels == kept.pixels).all()


def test_adaptive_asks_nothing_where_no_candidate_lies_in_the_mask():
    pixels = np.full((120, 200, 3), 255, np.uint8)
    pixels[30, 70:190] = (214, 40, 40)  # a line of one pixel through the middle of the box
    model = adaptive(ScriptedMllm(["[350,125,950,375]"], []))
    sizes, one = asked(model, RgbImage.from_pil(Image.fromarray(pixels)))
    assert sizes == [] and one.points == ()
    assert len(model.segmenter.prompts) == 1


def test_agreement_counts_sure_points_alone():
    mask = Mask(np.array([[True, True, False, False]]))
    on, off = PromptPoint(1, 0.5, PointLabel.FOREGROUND), PromptPoint(3, 0.5, PointLabel.BACKGROUND)
    wrong = PromptPoint(3, 0.5, PointLabel.FOREGROUND)
    unsure = PromptPoint(3, 0.5, PointLabel.UNDECIDED)
    assert agreement(mask, [on, off, unsure]) == 1
    assert agreement(mask, [on, off, wrong]) == pytest.approx(2 / 3)
    assert agreement(mask, [wrong]) == 0
    assert agreement(mask, [unsure]) == agreement(mask, []) == 1
