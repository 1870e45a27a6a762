"""Any chat VLM, and the base of the stock families: plain questions and a tolerant reader.

A stock model was not fine-tuned for this dialogue. It is asked about one point per question (it
was not trained to answer long lists in one reply), either by its coordinates or by a
numbered mark drawn on the picture, which such models read far better than coordinates (ResAgent,
arXiv 2601.16394). The wordings are ours unless a subclass attributes them to the model's maker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats import reading
from sam4mllm_tool.formats.base import BoxesRead, PointAsking, PromptsRead, Size
from sam4mllm_tool.formats.grids import PER_MILLE, Grid
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.protocols import YesNoWords
from sam4mllm_tool.types import Box, Point, PointLabel, PromptPoint, TargetCount

_YES_NO = YesNoWords(
    yes=("Yes", "yes", "YES", " Yes", " yes", " YES"), no=("No", "no", "NO", " No", " no", " NO")
)
_ONE_WORD = "Answer with one word, yes or no."
_ON = re.compile(r"[\"']?points_on[\"']?\s*:", re.IGNORECASE)
_OFF = re.compile(r"[\"']?points_off[\"']?\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class GenericFormat:
    """Asks in plain words for JSON boxes on a 0–1000 scale; families override what differs.

    Attributes:
        grid: the grid that this family's coordinates are in.
        box_key: JSON key of a box.
        y_first: coordinates are written as y, x instead of x, y.
        grid_words: how the question names the grid.
        point_asking: how points are named by default (by coordinates or by marks).
    """

    name: str = "generic"
    grid: Grid = PER_MILLE
    box_key: str = "bbox_2d"
    y_first: bool = False
    grid_words: str = "integers from 0 to 1000 relative to the image's width and height"
    system_prompt: str | None = None
    yes_no: YesNoWords = _YES_NO
    points_per_question: int = 1
    point_asking: PointAsking = "marks"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Round 1 in plain words, with the reply's form spelled out."""
        return (
            f"Locate {_which(count)}: {quoted(expression)}.\n"
            f'Reply with JSON only: [{{"{self.box_key}": {self._box_shape}, "label": "..."}}], '
            f"coordinates as {self.grid_words}.{_if_none(count)}"
        )

    def box_grammar(self, count: TargetCount) -> Grammar | None:
        """``None``: stock models write freely."""
        return None

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The JSON list that states these boxes."""
        return json.dumps([{self.box_key: self.box_numbers(box, size)} for box in boxes])

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """Boxes of a reply; any text around them is ignored."""
        return reading.read_boxes(reply, size, self.grid, y_first=self.y_first)

    def ask_points(self, expression: str, box: Box, points: Sequence[Point], size: Size) -> str:
        """Round 2 by coordinates; one point per question by default."""
        about = (
            f"the object described as {quoted(expression)}, bounding box {self.box_text(box, size)}"
        )
        if len(points) == 1:
            return f"Is the point {self.point_text(points[0], size)} on {about}? {_ONE_WORD}"
        listed = " ".join(self.point_text(point, size) for point in points)
        return (
            f"Which of these points are on {about}?\n{listed}\n"
            "Answer Yes or No for each point in this order, with nothing between the answers."
        )

    def ask_marks(self, expression: str, marks: Sequence[int]) -> str:
        """Round 2 by numbered marks on the picture, see :mod:`sam4mllm_tool.drawing.marks`."""
        about = f"the object described as {quoted(expression)}"
        drawn = (
            "The picture shows numbered marks, each a red dot with its number beside it; "
            "the thin frame shows where to look."
        )
        if len(marks) == 1:
            return f"{drawn} Is the dot of mark {marks[0]} on {about}? {_ONE_WORD}"
        listed = ", ".join(map(str, marks))
        return (
            f"{drawn} Which of the dots of marks {listed} are on {about}? "
            "Answer Yes or No for each mark in this order, with nothing between the answers."
        )

    def ask_box_and_points(
        self, expression: str, count: TargetCount, positive: int, negative: int, size: Size
    ) -> str:
        """PPG: a JSON object with a box, points on the object and points off it."""
        pair = "[y, x]" if self.y_first else "[x, y]"
        return (
            f"Locate {_which(TargetCount.ONE)}: {quoted(expression)}, and choose {positive} points "
            f"well inside it and {negative} points near it but not on it.\n"
            f'Reply with JSON only: {{"{self.box_key}": {self._box_shape}, '
            f'"points_on": [{pair}, ...], "points_off": [{pair}, ...]}}, '
            f"coordinates as {self.grid_words}.{_if_none(count)}"
        )

    def box_and_points_grammar(
        self, count: TargetCount, positive: int, negative: int
    ) -> Grammar | None:
        """``None``: stock models write freely."""
        return None

    def read_box_and_points(
        self, reply: str, positive: int, negative: int, size: Size
    ) -> tuple[PromptsRead, ...]:
        """The first box, then the points under ``points_on`` and ``points_off``."""
        boxes = self.read_boxes(reply, size).boxes
        if not boxes:
            return ()
        answer = reading.answer_part(reply)
        on, off = _ON.search(answer), _OFF.search(answer)
        if on is None or (off is None and negative > 0):
            raise DialogueError(
                "the reply holds no points_on and points_off",
                raw_reply=reply,
                hint="Use strategy 'pqpp' or 'box_only' with this model.",
            )
        split = off.start() if off else len(answer)
        parts = (
            answer[on.end() : split] if split > on.end() else answer[on.end() :],
            answer[split:],
        )
        labels = (PointLabel.FOREGROUND, PointLabel.BACKGROUND)
        points = tuple(
            PromptPoint(*reading.place_point(pair, size, self.grid, y_first=self.y_first), label)
            for part, label, most in zip(parts, labels, (positive, negative), strict=True)
            for pair in reading.two_numbers(part)[:most]
        )
        return (PromptsRead(boxes[0], points),)

    def ask_verification(self, expression: str, box: Box, size: Size) -> str:
        """Does this region show the expression?"""
        return (
            f"Does the region with bounding box {self.box_text(box, size)} show exactly what "
            f"{quoted(expression)} describes? {_ONE_WORD}"
        )

    def box_numbers(self, box: Box, size: Size) -> list[int]:
        """The box as whole numbers of the grid, in the family's order."""
        x_unit, y_unit = (e / s for e, s in zip(self.grid.extent(size), size, strict=True))
        x1, y1, x2, y2 = (round(v * u) for v, u in zip(box, (x_unit, y_unit) * 2, strict=True))
        return [y1, x1, y2, x2] if self.y_first else [x1, y1, x2, y2]

    def box_text(self, box: Box, size: Size) -> str:
        """How a question names a box."""
        return str(self.box_numbers(box, size))

    def point_text(self, point: Point, size: Size) -> str:
        """How a question names a point."""
        right, bottom = self.grid.extent(size)
        x, y = round(point.x / size[0] * right), round(point.y / size[1] * bottom)
        return f"[{y}, {x}]" if self.y_first else f"[{x}, {y}]"

    @property
    def _box_shape(self) -> str:
        return "[y_min, x_min, y_max, x_max]" if self.y_first else "[x_min, y_min, x_max, y_max]"


def quoted(expression: str) -> str:
    """The expression in double quotes, with its own double quotes replaced by single ones."""
    return '"' + expression.replace('"', "'").replace("\n", " ").strip() + '"'


def _which(count: TargetCount) -> str:
    if count is TargetCount.ONE:
        return "the one object that this describes"
    return "every object that this describes, each with its own box"


def _if_none(count: TargetCount) -> str:
    return " If nothing in the image fits, reply []." if count is TargetCount.ZERO_OR_MORE else ""
