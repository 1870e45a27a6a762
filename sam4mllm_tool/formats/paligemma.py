"""PaliGemma: ``<locYYYY><locXXXX><locYYYY><locXXXX> name``, 1024 bins, y first.

Source: PaliGemma (arXiv 2407.07726, section 3.2.5) and its task prefixes: ``detect THING``,
``answer en QUESTION``. PaliGemma is a transfer model, not a chat model: these are the prompts that
its "mix" checkpoints were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.formats import reading
from sam4mllm_tool.formats.base import BoxesRead, Size
from sam4mllm_tool.formats.generic import GenericFormat
from sam4mllm_tool.formats.grids import Grid, RelativeGrid
from sam4mllm_tool.types import Box, Point, TargetCount

_BINS = RelativeGrid(1024)
_LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)


@dataclass(frozen=True)
class PaliGemmaFormat(GenericFormat):
    """Task prefixes instead of sentences, location tokens instead of JSON."""

    name: str = "paligemma"
    grid: Grid = _BINS
    y_first: bool = True

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """``detect …``; the number of boxes is up to the model."""
        return f"detect {_one_line(expression)}"

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """Location tokens, boxes separated by `` ; ``."""
        return " ; ".join(self.box_text(box, size) for box in boxes)

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """Every four location tokens. Without any: nothing is there if the reply is empty or
        says so (the model answers a failed detection with the name alone or nothing).
        """
        if not reply.strip():
            return BoxesRead(())
        return reading.read_boxes(reply, size, self.grid, _find, y_first=True)

    def ask_points(self, expression: str, box: Box, points: Sequence[Point], size: Size) -> str:
        """``answer en …`` about a location."""
        listed = " ".join(self.point_text(point, size) for point in points)
        return f"answer en is {listed} on {_one_line(expression)}?"

    def ask_marks(self, expression: str, marks: Sequence[int]) -> str:
        """``answer en …`` about a drawn mark."""
        return f"answer en is mark {', '.join(map(str, marks))} on {_one_line(expression)}?"

    def ask_verification(self, expression: str, box: Box, size: Size) -> str:
        """``answer en …`` about a region."""
        return f"answer en does {self.box_text(box, size)} show {_one_line(expression)}?"

    def box_text(self, box: Box, size: Size) -> str:
        """Four location tokens; the far edge is written as the last bin."""
        return "".join(f"<loc{min(n, 1023):04d}>" for n in self.box_numbers(box, size))

    def point_text(self, point: Point, size: Size) -> str:
        """Two location tokens, y first."""
        bins = (min(1023, int(v / s * 1024)) for v, s in zip(reversed(point), reversed(size),
                                                              strict=True))  # fmt: skip
        return "".join(f"<loc{n:04d}>" for n in bins)


def _find(reply: str) -> list[reading.Numbers]:
    """Groups of four bins, each a 1,024th of the side; the last one is a bin short of the edge."""
    return [tuple(map(float, numbers)) for numbers in _LOCATIONS.findall(reply)]


def _one_line(expression: str) -> str:
    """PaliGemma's prompt ends with a newline, and ``;`` separates things to detect."""
    return expression.replace("\n", " ").replace(";", ",").strip()
