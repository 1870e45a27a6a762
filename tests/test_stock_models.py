"""Stock families through the pipeline: their own words, marks on the picture, verification."""

import json
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import ndimage

from sam4mllm_tool.drawing.marks import DOT
from sam4mllm_tool.formats import FORMATS
from sam4mllm_tool.formats.molmo import MolmoFormat
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.protocols import NO_NOTES, CheckpointNotes, Reply
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.types import Box, Mask, TargetCount, YesNo

STOCK = [known for known in FORMATS.values() if known.name != "sam4mllm"]


@dataclass
class SeeingMllm:
    """Answers a family's questions about one mask; sees marks by their pixels alone."""

    known: object
    mask: Mask
    prose: str = "{}"
    boxes: tuple[Box, ...] = ()
    name: str = "seeing"
    notes: CheckpointNotes = NO_NOTES
    questions: list[tuple[str, str]] = field(default_factory=list)

    @property
    def format_name(self):
        return self.known.name

    def generate(self, image, dialogue, *, grammar=None, max_new_tokens=256):
        assert grammar is None, "stock models write freely"
        self.questions.append((image.digest, dialogue[-1].text))
        boxes = self.boxes or (self.mask.box,)
        return Reply(self.prose.format(self.known.write_boxes(boxes, image.size)), -1.0, 9, 1)

    def alternates(self, image, dialogue, *, grammar, count):
        raise AssertionError("there is no grammar to search in")

    def answer_yes_no(self, image, dialogue, *, words, count):
        assert count == 1 and "yes" in words.yes
        text = dialogue[-1].text
        self.questions.append((image.digest, text))
        if "mark" not in text:
            return [YesNo(0.9, 0.05) if self._fits(text) else YesNo(0.1, 0.85)]
        number = int(re.search(r"mark (\d+)", text)[1])
        labels, found = ndimage.label((image.array == DOT).all(axis=2))
        centres = ndimage.center_of_mass(labels > 0, labels, range(1, found + 1))
        # The grid's marks are numbered row by row.
        row, column = sorted(centres, key=lambda c: (round(c[0] / 4), c[1]))[number - 1]
        inside = self.mask.contains(column + 0.5, row + 0.5)
        return [YesNo(0.95, 0.03) if inside else YesNo(0.03, 0.95)]

    def _fits(self, text):
        """Whether the box in a verification question is the mask's."""
        shape = (self.mask.width, self.mask.height)
        return self.known.box_text(self.mask.box, shape) in text


@pytest.fixture
def red(truth):
    return truth["the red block"][0]


@pytest.mark.parametrize("known", STOCK, ids=lambda known: known.name)
def test_marks_name_the_very_points_that_are_asked_about(known, blocks, red):
    # A disc, so that the corners of its box lie outside.
    rows, columns = np.mgrid[: blocks.height, : blocks.width]
    disc = Mask((rows + 0.5 - 60) ** 2 + (columns + 0.5 - 50) ** 2 <= 30**2)
    mllm = SeeingMllm(known, disc)
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(points=16))
    (found,) = model.segment(blocks, "the red block").objects
    assert len(found.points) == 16
    for point in found.points:
        assert (point.label == "foreground") == disc.contains(point.x, point.y)
    assert {point.label.value for point in found.points} == {"foreground", "background"}
    pictures = [digest for digest, _ in mllm.questions]
    assert pictures[0] == blocks.digest and len(set(pictures[1:])) == 1
    assert pictures[1] != blocks.digest, "all points share one marked picture"


@pytest.mark.parametrize(
    "prose",
    ["{}", "Sure! Here it is:\n```json\n{}\n```\nAnything else?", "<think>[1, 2, 3, 4]?</think>{}"],
)
@pytest.mark.parametrize("known", STOCK, ids=lambda known: known.name)
def test_the_mask_comes_out_whatever_stands_around_the_box(known, prose, blocks, red):
    mllm = SeeingMllm(known, red, prose.replace("{}", "%s").replace("{", "{{").replace("%s", "{}"))
    model = Sam4MLLM(mllm, ColourSegmenter(), Settings(strategy="box_only"))
    (found,) = model.segment(blocks, "the red block").objects
    assert found.mask == red
    nothing = replace(mllm, boxes=())
    nothing.generate = lambda *_, **__: Reply("There is none in the image.")
    told = replace(model, mllm=nothing).segment(blocks, "a dog", count=TargetCount.ZERO_OR_MORE)
    assert told.status == "not_found"


@pytest.mark.parametrize("known", STOCK, ids=lambda known: known.name)
def test_verification_chooses_among_the_boxes_of_a_reply(known, blocks, red, truth):
    wrong = truth["the blue block"][0].box
    mllm = SeeingMllm(known, red, boxes=(wrong, red.box))
    settings = Settings(strategy="box_only")
    plain = Sam4MLLM(mllm, ColourSegmenter(), settings).segment(blocks, "the red block", count="1")
    assert plain.objects[0].mask == truth["the blue block"][0]
    assert len(plain.objects[0].located.alternates) == 1
    checked = replace(settings, verified_boxes=2)
    found = Sam4MLLM(mllm, ColourSegmenter(), checked).segment(blocks, "the red block", count="1")
    assert found.objects[0].mask == red


def test_coordinates_can_be_asked_for_instead(blocks, red):
    known = FORMATS["qwen3_vl"]
    mllm = SeeingMllm(known, red)
    settings = Settings(points=4, point_asking="coordinates")
    Sam4MLLM(mllm, ColourSegmenter(), settings).segment(blocks, "the red block")
    asked = [text for digest, text in mllm.questions if digest == blocks.digest][1:]
    assert len(asked) == 4
    points = [json.loads(re.search(r"point (\[\d+, \d+\])", text)[1]) for text in asked]
    assert points == [[500, 188], [800, 188], [500, 312], [800, 312]]


def test_molmo_points_become_prompt_points(blocks, red):
    reply = (
        '<points x1="35.0" y1="12.5" x2="95.0" y2="37.5" x3="50.0" y3="20.0" x4="80.0" y4="30.0">'
        "red block</points>"
    )
    (prompts,) = MolmoFormat().read_box_and_points(reply, 3, 1, blocks.size)
    assert prompts.box == red.box
    assert [(p.x, p.y, p.label.value) for p in prompts.points] == [
        (100, 24, "foreground"),
        (160, 36, "foreground"),
    ]
