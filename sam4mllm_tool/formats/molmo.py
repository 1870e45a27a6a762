"""Molmo: ``<point x="12.3" y="45.6" alt="…">…</point>`` in percent of the image's sides.

Source: Molmo and PixMo (arXiv 2409.17146) and the makers' note on reading points; Molmo 2 writes
``<points coords="1 1 123 456 2 …">`` with 0–1000. The family points and does not draw boxes, so
round 1 asks for the two opposite corners, and the box is the one around the points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats import reading
from sam4mllm_tool.formats.base import BoxesRead, PromptsRead, Size
from sam4mllm_tool.formats.generic import GenericFormat, quoted
from sam4mllm_tool.formats.grids import PER_MILLE, Grid
from sam4mllm_tool.types import Box, Point, PointLabel, PromptPoint, TargetCount

_NUMBER = r"(\d{1,3}(?:\.\d{1,6})?)"
_PERCENT = re.compile(rf"x\d*\s*=\s*[\"']\s*{_NUMBER}[\"']\s+y\d*\s*=\s*[\"']\s*{_NUMBER}[\"']")
_COORDS = re.compile(r"coords\s*=\s*[\"']([\d\s;:,.]+)")
_TRIPLE = re.compile(r"\b\d+ (\d{3,4}) (\d{3,4})\b")


@dataclass(frozen=True)
class MolmoFormat(GenericFormat):
    """Points in percent with one decimal, which is a grid of 1000; boxes by their corners."""

    name: str = "molmo"
    grid: Grid = PER_MILLE

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Point to two corners."""
        none = " If it is not there, say so." if count is TargetCount.ZERO_OR_MORE else ""
        return (
            "Point to the top left corner and the bottom right corner of the bounding box of "
            f"{quoted(expression)}.{none}"
        )

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The corners of each box as one ``<points>`` element."""
        if not boxes:
            return "There are none."
        return " ".join(
            "<points "
            + " ".join(
                f'x{i}="{x / size[0] * 100:.1f}" y{i}="{y / size[1] * 100:.1f}"'
                for i, (x, y) in enumerate((box[:2], box[2:]), start=1)
            )
            + ' alt="corners">corners</points>'
            for box in boxes
        )

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """The box spanned by each pair of points; a single point is an error."""
        points = _permille_points(reply)
        if len(points) == 1:
            raise DialogueError(
                "the reply contains one point; a box needs two",
                raw_reply=reply,
                hint="Use strategy 'ppg', which asks this family for points on the object.",
            )
        corners = [(*a, *b) for a, b in zip(points[::2], points[1::2], strict=False)]
        return reading.read_boxes(reply, size, self.grid, lambda _: corners)

    def ask_box_and_points(
        self, expression: str, count: TargetCount, positive: int, negative: int, size: Size
    ) -> str:
        """PPG: corners first, then points on the object; the family points at things only."""
        return (
            f"{self.ask_boxes(expression, count, size)} Then point to {positive} places on "
            f"{quoted(expression)}."
        )

    def read_box_and_points(
        self, reply: str, positive: int, negative: int, size: Size
    ) -> tuple[PromptsRead, ...]:
        """Two corners, then points on the object; no points off it."""
        boxes = self.read_boxes(reply, size).boxes
        points = _permille_points(reply)[2 : 2 + positive]
        if not boxes:
            return ()
        on = (reading.place_point(point, size, self.grid) for point in points)
        labelled = tuple(PromptPoint(x, y, PointLabel.FOREGROUND) for x, y in on)
        return (PromptsRead(boxes[0], labelled),)

    def box_text(self, box: Box, size: Size) -> str:
        """Corners in percent."""
        return (
            f"{self.point_text(Point(*box[:2]), size)} to {self.point_text(Point(*box[2:]), size)}"
        )

    def point_text(self, point: Point, size: Size) -> str:
        """``(x=12.3, y=45.6)`` in percent."""
        return f"(x={point.x / size[0] * 100:.1f}, y={point.y / size[1] * 100:.1f})"


def _permille_points(reply: str) -> list[reading.Numbers]:
    """All points of a reply, 0–1000; those outside the picture are dropped, as by the makers."""
    answer = reading.answer_part(reply)
    points = [(round(float(x) * 10, 6), round(float(y) * 10, 6)) for x, y in
              _PERCENT.findall(answer)]  # fmt: skip
    for coords in _COORDS.findall(answer):
        points += [(float(x), float(y)) for x, y in _TRIPLE.findall(coords)]
    return [point for point in points if max(point) <= 1000]
