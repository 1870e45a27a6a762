"""Where a point lies: on the target, on another object, on the background, or near the outline.

A model can be right about most points by distinguishing things from background. Only points on
other objects show whether it knows *which* thing is meant, and points at outlines how well it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from scipy.ndimage import distance_transform_edt

from sam4mllm_tool.types import Mask

Place = Literal["target", "other", "background", "outline"]
PLACES: tuple[Place, ...] = get_args(Place)
OUTLINE = 0.03
"""Points closer to the targets' outline than this share of √area are near it."""


class Places:
    """Looks up where points lie.

    Args:
        targets: masks of what is meant, at least one.
        others: masks of the picture's other objects; ``None`` if they are not known.
    """

    def __init__(self, targets: Sequence[Mask], others: Sequence[Mask] | None) -> None:
        self._target = np.logical_or.reduce([mask.pixels for mask in targets])
        inside = distance_transform_edt(self._target)
        self._distance = np.where(
            self._target, inside, distance_transform_edt(~self._target)
        )  # pixels to the nearest pixel of the other side
        self._others = others
        self._near = OUTLINE * float(np.sqrt(self._target.sum()))

    def of(self, x: float, y: float) -> Place | None:
        """The place of a point (pixels); ``None`` off the targets if other objects are not known.

        A point outside the picture is judged by the nearest pixel.
        """
        height, width = self._target.shape
        row, column = min(max(int(y), 0), height - 1), min(max(int(x), 0), width - 1)
        if self._distance[row, column] - 0.5 < self._near:
            return "outline"
        if self._target[row, column]:
            return "target"
        if self._others is None:
            return None
        on_other = any(mask.pixels[row, column] for mask in self._others)
        return "other" if on_other else "background"
