"""Qwen3-VL (and Qwen3.5): JSON ``bbox_2d``, 0–1000 relative to the image's sides.

Source: the makers' 2D-grounding cookbook ("relative coordinates ranging from 0 to 1000", where
Qwen2.5-VL had absolute ones).
"""

from __future__ import annotations

from dataclasses import dataclass

from sam4mllm_tool.formats.base import Size
from sam4mllm_tool.formats.generic import GenericFormat, quoted
from sam4mllm_tool.types import TargetCount


@dataclass(frozen=True)
class Qwen3VlFormat(GenericFormat):
    """Asks as in the cookbook."""

    name: str = "qwen3_vl"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Locate …, report bbox coordinates in JSON."""
        which = "the object" if count is TargetCount.ONE else "every instance"
        none = " If there is none, report []." if count is TargetCount.ZERO_OR_MORE else ""
        return (
            f"Locate {which} that matches this description: {quoted(expression)}. "
            f"Report bbox coordinates in JSON format.{none}"
        )
