"""What a handle refers to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sam4mllm_tool.masks.interop import LabelledMask
from sam4mllm_tool.pipeline.results import Location
from sam4mllm_tool.protocols import MaskCandidate
from sam4mllm_tool.types import Box, Mask, PromptPoint, RgbImage


@dataclass(frozen=True)
class ImageRecord:
    """An image an agent may refer to."""

    image_id: str
    image: RgbImage
    source: str
    notes: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """What files about it call the picture."""
        return Path(self.source).name if self.source else self.image_id


@dataclass(frozen=True)
class ObjectRecord:
    """An object of an image: where it is, what was asked about it, and its mask if drawn.

    Attributes:
        number: counts the objects of a workspace from 1; what pictures show.
        location: round 1's dialogue, which round 2 continues; ``None`` for an object made from
            prompts or from other objects' masks.
        drawn: the chosen mask with its logits, ``None`` until a mask is drawn.
        mask: the mask; without ``drawn`` for an object made by combining masks.
    """

    image_id: str
    name: str
    box: Box
    object_id: str = ""
    number: int = 0
    score: float | None = None
    location: Location | None = None
    points: tuple[PromptPoint, ...] = ()
    drawn: MaskCandidate | None = None
    mask: Mask | None = None


def labelled_masks(objects: Iterable[ObjectRecord]) -> list[LabelledMask]:
    """The masks of those objects that have one, as other libraries take them."""
    return [
        LabelledMask(one.name, one.mask, one.score, one.object_id)
        for one in objects
        if one.mask is not None
    ]
