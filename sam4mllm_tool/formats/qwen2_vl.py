"""Qwen2-VL: ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``, 0–1000 relative to the image's sides.

Source: Qwen2-VL (arXiv 2409.12191, section 2.2.1). The box tokens are special ones that a decoder
may leave out of the text, so the reader only requires the two corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.formats.base import Size
from sam4mllm_tool.formats.generic import GenericFormat, quoted
from sam4mllm_tool.types import Box, TargetCount


@dataclass(frozen=True)
class Qwen2VlFormat(GenericFormat):
    """Asks for the detection of a phrase."""

    name: str = "qwen2_vl"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Detect the bounding box of …"""
        none = " If there is none, say none." if count is TargetCount.ZERO_OR_MORE else ""
        return f"Detect the bounding box of {quoted(expression)}.{none}"

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The boxes between the family's box tokens."""
        return "".join(f"<|box_start|>{self.box_text(b, size)}<|box_end|>" for b in boxes) or "none"

    def box_text(self, box: Box, size: Size) -> str:
        """``(x1,y1),(x2,y2)``."""
        x1, y1, x2, y2 = self.box_numbers(box, size)
        return f"({x1},{y1}),({x2},{y2})"
