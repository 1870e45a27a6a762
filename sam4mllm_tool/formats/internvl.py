"""InternVL 2–3.5: ``<ref>…</ref><box>[[x1, y1, x2, y2]]</box>``, 0–1000.

Source: the makers' grounding example ("Please provide the bounding box coordinate of the region
this sentence describes: <ref>…</ref>") and their chat-data format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.formats.base import Size
from sam4mllm_tool.formats.generic import GenericFormat
from sam4mllm_tool.types import Box, TargetCount


@dataclass(frozen=True)
class InternVlFormat(GenericFormat):
    """The makers' grounding question."""

    name: str = "internvl"

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """The maker's sentence, extended if several boxes or no box may be answered."""
        more = "" if count is TargetCount.ONE else " Give the box of every such object."
        none = " If there is none, say none." if count is TargetCount.ZERO_OR_MORE else ""
        return (
            "Please provide the bounding box coordinate of the region this sentence describes: "
            f"<ref>{expression.replace('</ref>', '')}</ref>{more}{none}"
        )

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """``<box>[[…], […]]</box>``."""
        if not boxes:
            return "none"
        return f"<box>[{', '.join(self.box_text(box, size) for box in boxes)}]</box>"
