"""Qwen-VL-Chat, served: ``<ref>…</ref><box>(x1,y1),(x2,y2)</box>``, 0–999 of the image's sides.

Source: Qwen-VL's README and tutorial (github.com/QwenLM/Qwen-VL), whose questions are Chinese, and
the drawing of a reply published there (``Shanghai_Output.jpg``): a number n means n/1000 of
the side. The tags are special tokens, which a server leaves out of the text.

transformers has no class for this model and its own code is not loaded here, so it is driven
through an endpoint only (docs/endpoint.md). An adapter trained on SAM4MLLM's dialogue over it
speaks the format ``sam4mllm``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sam4mllm_tool.formats import reading
from sam4mllm_tool.formats.base import BoxesRead, Size
from sam4mllm_tool.formats.generic import quoted
from sam4mllm_tool.formats.qwen2_vl import Qwen2VlFormat
from sam4mllm_tool.types import Box, TargetCount

NONE = "没有"
_CORNERS = re.compile(r"\((\d{1,4}), ?(\d{1,4})\), ?\((\d{1,4}), ?(\d{1,4})\)")
_NOTHING_THERE = (NONE, "不存在", "找不到", "无法找到")


@dataclass(frozen=True)
class QwenVlFormat(Qwen2VlFormat):
    """Asks for the detection box in the documentation's words."""

    name: str = "qwen_vl"
    system_prompt: str | None = "You are a helpful assistant."

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """ "Grid the position of … in the picture", in Chinese (the maker's wording)."""
        none = f"。如果图中没有，请回答：{NONE}" if count is TargetCount.ZERO_OR_MORE else ""
        return f"框出图中{quoted(expression)}的位置{none}"

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The boxes between the family's tags."""
        return "".join(f"<box>{self.box_text(box, size)}</box>" for box in boxes) or NONE

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """Boxes of a reply, with or without its tags; or a Chinese statement that nothing fits."""
        if not _find(reply) and any(words in reply for words in _NOTHING_THERE):
            return BoxesRead(())
        return reading.read_boxes(reply, size, self.grid, _find)

    def box_numbers(self, box: Box, size: Size) -> list[int]:
        """Whole numbers below 1000."""
        return [min(number, 999) for number in super().box_numbers(box, size)]


def _find(reply: str) -> list[reading.Numbers]:
    """The documented pairs of corners; any other group of four numbers only where there are none,
    since the reply repeats the expression."""
    found = [tuple(map(float, corners)) for corners in _CORNERS.findall(reply)]
    return list(dict.fromkeys(found)) or reading.four_numbers(reply)
