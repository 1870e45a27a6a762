"""Everything a user replaces can be written from the exported names alone."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import sam4mllm_tool as sam
from sam4mllm_tool import grammar


class FourCorners:
    """A dialogue format of its own: boxes as words, one number each."""

    name = "four_corners"
    system_prompt = None
    yes_no = sam.YesNoWords(yes=("Yes",), no=("No",))
    points_per_question = 100
    point_asking = "coordinates"

    def ask_boxes(self, expression, count, size):
        return f"Where is {expression}?"

    def box_grammar(self, count):
        return (grammar.Literal("box "), grammar.Number(digits=3))

    def write_boxes(self, boxes, size):
        return " ".join("box " + "/".join(f"{v:g}" for v in box) for box in boxes)

    def read_boxes(self, reply, size):
        parts = reply.split("box ")[1:]
        boxes = tuple(sam.Box(*map(float, part.split("/"))) for part in parts)
        return sam.BoxesRead(boxes)

    def ask_points(self, expression, box, points, size):
        return "On it? " + " ".join(f"({p.x:g},{p.y:g})" for p in points)

    def ask_marks(self, expression, marks):
        return f"Marks {marks}?"

    def ask_box_and_points(self, expression, count, positive, negative, size):
        return "Box and points?"

    def box_and_points_grammar(self, count, positive, negative):
        return None

    def read_box_and_points(self, reply, positive, negative, size):
        return tuple(sam.PromptsRead(box, ()) for box in self.read_boxes(reply, size).boxes)

    def ask_verification(self, expression, box, size):
        return "Is it?"


@dataclass
class Parrot:
    """An MLLM that always answers the same."""

    reply: str
    name = "parrot"
    format_name = "four_corners"
    notes = sam.CheckpointNotes(lower_case=True, points_per_question=4, caution="a parrot")
    asked: tuple[str, ...] = ()

    def generate(self, image, dialogue, *, grammar=None, max_new_tokens=256):
        self.asked += (dialogue[-1].text,)
        return sam.Reply(self.reply, log_probability=-0.5, tokens=1)

    def alternates(self, image, dialogue, *, grammar, count):
        return [self.generate(image, dialogue, grammar=grammar)]

    def answer_yes_no(self, image, dialogue, *, words, count):
        self.asked += (dialogue[-1].text,)
        return [sam.YesNo(0.99, 0.01)] * count


class BoxFiller:
    """A segmenter that fills the box."""

    name = "box filler"

    def embed(self, image):
        pass

    def predict(self, image, prompts):
        def fill(prompt):
            pixels = np.zeros((image.height, image.width), bool)
            x0, y0, x1, y1 = map(int, prompt.box)
            pixels[y0:y1, x0:x1] = True
            logits = np.zeros((1, 1), np.float32)
            return (sam.MaskCandidate(sam.Mask(pixels), logits, 0.9),)

        return [fill(prompt) for prompt in prompts]

    def logits_at_image_size(self, image, logits):
        return np.zeros((image.height, image.width), np.float32)


class TopHalf:
    """A strategy: the upper half of the box, no questions about points."""

    name = "top_half"

    def run(self, steps, image, expression, count):
        location = steps.locate(image, expression, count)
        prompts = [
            sam.SegmentPrompt(replace_y_max(one.box)) for one in location.objects
        ]  # fmt: skip
        drawn = steps.draw(image, prompts)
        pairs = zip(location.objects, drawn, strict=True)
        return location, tuple(sam.SegmentedObject(found, (), mask) for found, mask in pairs)


def replace_y_max(box):
    return box._replace(y_max=(box.y_min + box.y_max) / 2)


@pytest.fixture
def parrot() -> sam.Sam4MLLM:
    return sam.Sam4MLLM(Parrot("box 10/20/50/80"), BoxFiller(), format=FourCorners())


def test_a_model_of_ones_own_parts_runs(parrot, blocks):
    assert isinstance(parrot.mllm, sam.Mllm) and isinstance(parrot.segmenter, sam.Segmenter)
    assert isinstance(FourCorners(), sam.DialogueFormat) and isinstance(TopHalf(), sam.Strategy)
    found = parrot.segment(blocks, "The RED Block")
    assert found.objects[0].mask.box == (10, 20, 50, 80)
    question, *points = parrot.mllm.asked
    assert question == "Where is the red block?"  # it was taught lower case
    assert [text.count("(") for text in points] == [4, 4, 1]  # and lists of four
    assert found.notes == ("a parrot",)
    assert found.location.expression == "The RED Block"


def test_a_strategy_of_ones_own_runs_and_is_replayed(parrot, blocks, tmp_path):
    found = parrot.segment(blocks, "the red block", strategy=TopHalf())
    assert found.objects[0].mask.box == (10, 20, 50, 50)
    trace = sam.Trace.load(found.trace.save(tmp_path / "run.json"))
    assert trace.strategy == "top_half"
    again = sam.replay(trace, blocks, BoxFiller(), format=FourCorners(), strategy=TopHalf())
    assert again.objects[0].mask == found.objects[0].mask
    with pytest.raises(sam.InputError, match="top_half"):
        sam.replay(trace, blocks, BoxFiller(), format=FourCorners())


def test_a_tool_of_ones_own_uses_it(parrot, blocks):
    class Arguments(sam.ToolArguments):
        image: sam.ImageSource
        expression: sam.Expression

    class Result(sam.ToolResult):
        height: float

    def run(context: sam.ToolContext, arguments: Arguments) -> sam.ToolOutput:
        record = context.workspace.open_image(arguments.image)
        location = context.model.locate(record.image, arguments.expression)
        height = location.objects[0].box.height
        return sam.ToolOutput(Result(text=f"{height} pixels", height=height))

    spec = sam.ToolSpec("measure_height", "How high?", Arguments, Result, run)
    toolbox = sam.Toolbox(parrot, tools=[*sam.BUILTIN_TOOLS, spec])
    image = toolbox.workspace.open_image(blocks.pil).image_id
    arguments = {"image": image, "expression": "the red block"}
    assert toolbox.call("measure_height", arguments).result.height == 60


@pytest.mark.parametrize("form", ["path", "str", "bytes", "pil", "array", "loaded", "rgb"])
def test_images_come_in_any_form(parrot, blocks, blocks_file, form):
    image = {
        "path": blocks_file,
        "str": str(blocks_file),
        "bytes": blocks_file.read_bytes(),
        "pil": blocks.pil,
        "array": blocks.array,
        "loaded": sam.load_image(blocks_file),
        "rgb": blocks,
    }[form]
    assert parrot.segment(image, "x").objects[0].mask.pixels.shape == (120, 200)
    location = parrot.locate(image, "x")
    points = parrot.check_points(image, location, location.objects[0].box)
    assert len(points) == 9
    assert parrot.draw(image, [sam.SegmentPrompt(sam.Box(1, 2, 3, 9))])[0].mask.area == 14


def test_counts_and_strategies_are_named_by_text(parrot, blocks):
    assert parrot.segment(blocks, "x", count="1+", strategy="box_only").trace.count == "1+"
    for wrong, nearest in [({"count": "0"}, "0+"), ({"strategy": "pqqp"}, "pqpp")]:
        with pytest.raises(sam.InputError) as caught:
            parrot.segment(blocks, "x", **wrong)
        assert f"Did you mean {nearest!r}?" in caught.value.hint


def test_a_misspelt_option_is_refused_before_anything_is_loaded():
    with pytest.raises(sam.InputError, match="'quantisation'") as caught:
        sam.load("no/such/model", quantisation="4bit")
    assert "Did you mean 'quantization'?" in caught.value.hint
    with pytest.raises(sam.InputError) as caught:
        sam.load("http://127.0.0.1:9/v1", modl="x")
    assert "Did you mean 'model'?" in caught.value.hint


def test_a_score_is_a_probability_or_nothing(parrot, blocks):
    plain = parrot.locate(blocks, "x").objects[0]
    assert plain.score is None
    assert plain.likelihood == pytest.approx(0.6065, abs=1e-4)  # exp(-0.5), one token
    parrot.mllm.notes = sam.CheckpointNotes(box_calibration=(2.0, 3.0))
    # 1 / (1 + exp(-(2 · -0.5 + 3)))
    assert parrot.locate(blocks, "x").objects[0].score == pytest.approx(0.8808, abs=1e-4)


def test_settings_of_a_run_are_values(parrot):
    other = replace(parrot, settings=sam.Settings(points=4))
    assert parrot.settings.points == 9 and other.settings.points == 4
    assert sam.__version__.count(".") == 2


@pytest.mark.parametrize("wrong", [{"strategy": TopHalf}, {"strategy": 3}, {"expression": None}])
def test_what_is_no_strategy_or_text_is_refused(parrot, blocks, wrong):
    with pytest.raises(sam.InputError) as caught:
        parrot.segment(blocks, **{"expression": "the red block", **wrong})
    assert caught.value.hint


def test_a_misspelt_format_names_the_nearest_one():
    with pytest.raises(sam.CheckpointError) as caught:
        sam.load(format="sam4mlm")
    assert "Did you mean 'sam4mllm'?" in caught.value.hint
