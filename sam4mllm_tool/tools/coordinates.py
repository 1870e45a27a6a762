"""The coordinates an agent uses: pixels, or thousandths of the image's sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sam4mllm_tool.errors import PromptError
from sam4mllm_tool.types import Box, Point

Coordinates = Literal["pixels", "relative_1000"]


@dataclass(frozen=True)
class Frame:
    """Translates between an agent's numbers and pixels of one image."""

    coordinates: Coordinates
    width: int
    height: int

    @staticmethod
    def describe(coordinates: Coordinates) -> str:
        """One sentence for a tool's description."""
        unit = (
            "pixels of the upright image"
            if coordinates == "pixels"
            else "thousandths of the image's width and height (0 to 1000)"
        )
        return f"Coordinates are {unit}, origin at the top left, x to the right, y down."

    @property
    def _scale(self) -> tuple[float, float]:
        if self.coordinates == "pixels":
            return 1.0, 1.0
        return self.width / 1000, self.height / 1000

    def point_in(self, x: float, y: float) -> Point:
        """An agent's point in pixels. The far edge 1000 of a relative frame is the last pixel."""
        if self.coordinates == "pixels":
            return Point(x, y)
        scale_x, scale_y = self._scale
        return Point(
            math.nextafter(self.width, 0) if x == 1000 else x * scale_x,
            math.nextafter(self.height, 0) if y == 1000 else y * scale_y,
        )

    def box_in(self, numbers: Sequence[float]) -> Box:
        """An agent's box in pixels.

        Raises:
            PromptError: not finite, or without area.
        """
        if not all(math.isfinite(n) for n in numbers):
            raise PromptError("the box is not finite", hint="Give four plain numbers.")
        scale_x, scale_y = self._scale
        x_min, y_min, x_max, y_max = numbers
        box = Box(x_min * scale_x, y_min * scale_y, x_max * scale_x, y_max * scale_y)
        if box.width <= 0 or box.height <= 0:
            raise PromptError(
                f"the box {list(numbers)} has no area",
                hint="Give [x_min, y_min, x_max, y_max] with x_min < x_max and y_min < y_max.",
            )
        return box

    def point_out(self, point: Point) -> tuple[float, float]:
        """Pixels in the agent's numbers, to a tenth."""
        scale_x, scale_y = self._scale
        return round(point.x / scale_x, 1), round(point.y / scale_y, 1)

    def box_out(self, box: Box) -> list[float]:
        """Pixels in the agent's numbers, to a tenth."""
        return [*self.point_out(Point(*box[:2])), *self.point_out(Point(*box[2:]))]

    def length_out(self, pixels: float) -> float:
        """A length in pixels, or in thousandths of the longer side."""
        scale = max(self._scale) if self.coordinates == "relative_1000" else 1.0
        return round(pixels / scale, 1)
