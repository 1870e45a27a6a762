"""SAM4MLLM's own dialogue: integers 0–999 of the image's sides, as plain text.

The question strings are the published adapters' protocol (Chen et al., "SAM4MLLM: Enhance
Multi-Modal Large Language Model for Referring Expression Segmentation", ECCV 2024). The PPG
question and the verification question are ours, because the authors' are not public.

Coordinates follow the authors' data preparation and demo: a number n in the text means n/1000 of
the side (not the middle of a cell); boxes are rounded to the nearest integer when written, points
are truncated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats.base import BoxesRead, PointAsking, PromptsRead, Size
from sam4mllm_tool.grammar import Choice, Grammar, Literal, Number, Repeat
from sam4mllm_tool.protocols import YesNoWords
from sam4mllm_tool.types import Box, Point, PointLabel, PromptPoint, TargetCount

STEPS = 1000
NO_TARGET = "No object found."
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_POINT = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_COMMA = Literal(",")
# A box without its opening bracket, which is part of the literal before it.
_BOX_REST: Grammar = (
    Number(3), _COMMA, Number(3), _COMMA, Number(3), _COMMA, Number(3), Literal("]"),
)  # fmt: skip
_POINT_PART: Grammar = (Literal(" ("), Number(3), _COMMA, Number(3), Literal(")"))

_YES_NO = YesNoWords(yes=("Yes",), no=("No",))


@dataclass(frozen=True)
class Sam4MllmFormat:
    """The 0–999 text protocol of SAM4MLLM's adapters and of the embedded model."""

    name: str = "sam4mllm"
    system_prompt: str | None = SYSTEM_PROMPT
    yes_no: YesNoWords = _YES_NO
    points_per_question: int = 30
    point_asking: PointAsking = "coordinates"
    max_boxes: int = 16

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Round 1 in the published wording; (1), (1+) or (0+) says how many to expect."""
        return (
            "Please provide the bounding box coordinate of the region this sentence describes "
            f'({count.value}):\n"{expression}".'
        )

    def box_grammar(self, count: TargetCount) -> Grammar:
        """``[…]``, further boxes for 1+ and 0+, or the no-target sentence for 0+."""
        return self._targets(count, ())

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """Boxes in the reply's form, or the no-target sentence."""
        return " ".join(_box_text(box, size) for box in boxes) if boxes else NO_TARGET

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """Every ``[a,b,c,d]`` of the reply; swapped, empty or off-scale ones are corrected."""
        found = _BOX.findall(reply)
        if not found:
            if re.search(r"\bno (object|target)", reply, re.IGNORECASE):
                return BoxesRead(())
            raise DialogueError(
                "the reply contains no box of the form [x1,y1,x2,y2]",
                raw_reply=reply,
                hint="Rephrase the expression; if this always happens, check that the checkpoint "
                "speaks the 'sam4mllm' format.",
            )
        boxes, notes = zip(*(_read_box([int(n) for n in numbers], size) for numbers in found),
                           strict=True)  # fmt: skip
        return BoxesRead(boxes, tuple(dict.fromkeys(n for some in notes for n in some)))

    def ask_points(self, expression: str, box: Box, points: Sequence[Point], size: Size) -> str:
        """Round 2 in the wording of the authors' training data."""
        listed = " ".join(_point_text(point, size) for point in points)
        return (
            "Check if the points listed below are located on the object with bounding box "
            f"{_box_text(box, size)}:\n{listed}"
        )

    def ask_marks(self, expression: str, marks: Sequence[int]) -> str:
        """Round 2 by drawn marks (our wording; published adapters were not trained on it)."""
        listed = " ".join(map(str, marks))
        return f'Check if the marks listed below are located on "{expression}":\n{listed}'

    def ask_box_and_points(
        self, expression: str, count: TargetCount, positive: int, negative: int, size: Size
    ) -> str:
        """PPG question (our wording)."""
        return (
            f"Please provide the bounding box and prompt points, {positive} on the object and "
            f"{negative} off it, of the region this sentence describes "
            f'({count.value}):\n"{expression}".'
        )

    def box_and_points_grammar(self, count: TargetCount, positive: int, negative: int) -> Grammar:
        """A box and its points, once or several times, or the no-target sentence for 0+."""
        return self._targets(count, _POINT_PART * (positive + negative))

    def read_box_and_points(
        self, reply: str, positive: int, negative: int, size: Size
    ) -> tuple[PromptsRead, ...]:
        """Each box, followed by ``positive`` points on the object and ``negative`` off it."""
        boxes = self.read_boxes(reply, size).boxes
        parts = _BOX.split(reply)[5::5] if boxes else []  # the text after each box's 4 groups
        return tuple(
            PromptsRead(box, _read_points(part, positive, negative, size, reply))
            for box, part in zip(boxes, parts, strict=True)
        )

    def _targets(self, count: TargetCount, behind: Grammar) -> Grammar:
        """As many boxes as the count allows, each followed by ``behind``."""
        box: Grammar = (Literal("["), *_BOX_REST, *behind)
        if count is TargetCount.ONE:
            return box
        more = Repeat((Literal(" ["), *_BOX_REST, *behind), 0, self.max_boxes - 1)
        if count is TargetCount.ONE_OR_MORE:
            return (*box, more)
        return (Choice(((Literal(NO_TARGET),), (*box, more))),)

    def ask_verification(self, expression: str, box: Box, size: Size) -> str:
        """Box verification (our wording)."""
        return (
            f"Does the region {_box_text(box, size)} show what this sentence describes?\n"
            f'"{expression}".'
        )


def _box_text(box: Box, size: Size) -> str:
    """``[x1,y1,x2,y2]``, rounded; the far edge of the image (1000) is written as 999."""
    sides = (size[0], size[1], size[0], size[1])
    numbers = [round(v / side * STEPS) for v, side in zip(box, sides, strict=True)]
    return "[" + ",".join(f"{_on_scale(number):03d}" for number in numbers) + "]"


def _point_text(point: Point, size: Size) -> str:
    """``(x,y)``, truncated."""
    # Reading a number and writing it again must give the same number despite float rounding.
    x, y = (math.floor(v / side * STEPS + 1e-6) for v, side in zip(point, size, strict=True))
    return f"({_on_scale(x):03d},{_on_scale(y):03d})"


def _on_scale(number: int) -> int:
    return min(STEPS - 1, max(0, number))


def _read_points(
    text: str, positive: int, negative: int, size: Size, reply: str
) -> tuple[PromptPoint, ...]:
    found = _POINT.findall(text)
    if len(found) < positive + negative:
        raise DialogueError(
            f"the reply contains {len(found)} points instead of {positive + negative}",
            raw_reply=reply,
            hint="Ask for fewer points, or use strategy 'pqpp'.",
        )
    labels = [PointLabel.FOREGROUND] * positive + [PointLabel.BACKGROUND] * negative
    return tuple(
        PromptPoint(_on_scale(int(x)) / STEPS * size[0], _on_scale(int(y)) / STEPS * size[1], label)
        for (x, y), label in zip(found, labels, strict=False)
    )


def _read_box(numbers: list[int], size: Size) -> tuple[Box, tuple[str, ...]]:
    """A box at least one grid cell wide and high, with notes on what was corrected."""
    notes = []
    if max(numbers) >= STEPS:
        numbers = [_on_scale(n) for n in numbers]
        notes.append("a coordinate off the 0–999 scale was clamped")
    x1, y1, x2, y2 = numbers
    if x2 < x1 or y2 < y1:
        x1, x2 = sorted((x1, x2))
        y1, y2 = sorted((y1, y2))
        notes.append("a box with swapped corners was corrected")
    if x1 == x2 or y1 == y2:
        notes.append("an empty box was widened to one grid cell")
    x2, y2 = x2 + (x1 == x2), y2 + (y1 == y2)
    box = Box(x1 / STEPS * size[0], y1 / STEPS * size[1],
              x2 / STEPS * size[0], y2 / STEPS * size[1])  # fmt: skip
    return box, tuple(notes)
