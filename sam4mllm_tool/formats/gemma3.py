"""Gemma 3 and later: JSON ``box_2d`` with y first, 0–1000.

Source: the form that Google documents for Gemini's bounding boxes ([ymin, xmin, ymax, xmax]
normalised to 0–1000), which Gemma models follow when the question spells it out.
"""

from __future__ import annotations

from dataclasses import dataclass

from sam4mllm_tool.formats.generic import GenericFormat


@dataclass(frozen=True)
class Gemma3Format(GenericFormat):
    """The generic questions with Gemini's key and order."""

    name: str = "gemma3"
    box_key: str = "box_2d"
    y_first: bool = True
