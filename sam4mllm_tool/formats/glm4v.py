"""GLM-4.1V, 4.5V, 4.6V: ``<|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>``, 0–1000.

Source: the makers' model cards and grounding notes (x = round(x_pixel / W * 1000)). Replies may
begin with ``<think>…</think>``; ``begin_of_box`` marks any final answer, not only boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.formats.base import Size
from sam4mllm_tool.formats.generic import GenericFormat, quoted
from sam4mllm_tool.types import Box, TargetCount


@dataclass(frozen=True)
class Glm4vFormat(GenericFormat):
    """Asks for ``[[x1,y1,x2,y2]]`` in words."""

    name: str = "glm4v"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Where is it? Answer in [[x1,y1,x2,y2]] format."""
        what = "box" if count is TargetCount.ONE else "box of every region"
        none = " If there is none, answer none." if count is TargetCount.ZERO_OR_MORE else ""
        return (
            f"Please provide the bounding {what} described by {quoted(expression)} "
            f"in [[x1,y1,x2,y2]] format, with coordinates normalized to 0-1000.{none}"
        )

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The boxes as the model's final answer."""
        listed = ",".join(self.box_text(box, size).replace(" ", "") for box in boxes)
        return f"<|begin_of_box|>{f'[{listed}]' if boxes else 'none'}<|end_of_box|>"
