"""Qwen2.5-VL: JSON ``bbox_2d`` in absolute pixels of the smart-resized picture.

Source: Qwen2.5-VL technical report (arXiv 2502.13923, section 2.1: absolute coordinates) and the
makers' spatial-understanding cookbook.
"""

from __future__ import annotations

from dataclasses import dataclass

from sam4mllm_tool.formats.base import Size
from sam4mllm_tool.formats.generic import GenericFormat, quoted
from sam4mllm_tool.formats.grids import DEFAULT_RESIZED, Grid
from sam4mllm_tool.types import TargetCount


@dataclass(frozen=True)
class Qwen25VlFormat(GenericFormat):
    """Asks as in the cookbook; ``grid`` must have the processor's pixel limits."""

    name: str = "qwen2_5_vl"
    grid: Grid = DEFAULT_RESIZED
    grid_words: str = "absolute pixel coordinates of the image"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Locate … and output in JSON; the model knows the form from its training."""
        one = count is TargetCount.ONE
        none = " If there is none, output []." if count is TargetCount.ZERO_OR_MORE else ""
        return (
            f"Locate {'the object' if one else 'every object'} that matches the description "
            f"{quoted(expression)}. Output {'its' if one else 'the'} bbox coordinates in JSON "
            f"format.{none}"
        )
