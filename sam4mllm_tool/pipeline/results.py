"""What the flow is set by, and what it gives back: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sam4mllm_tool.formats.base import PointAsking
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.protocols import Dialogue, MaskCandidate
from sam4mllm_tool.types import Box, Mask, PromptPoint, Status, TargetCount


@dataclass(frozen=True)
class Settings:
    """How the dialogue is held.

    Attributes:
        strategy: name of a built-in strategy, see :mod:`sam4mllm_tool.pipeline.strategies`.
        points: candidate points per box in round 2.
        candidates: how they are spread over the box: an even grid, Poisson disk (the authors'
            training), or a jittered grid (their demo, with ``points=15``).
        thresholds: which answers count.
        point_asking: points named by coordinates, or by numbered marks drawn on the picture (one
            extra image for all points); ``None`` = as the dialogue format prefers.
        verified_boxes: with more than one, that many candidate boxes are each shown to the MLLM
            ("does this region show …?") and the surest is taken, if one object is found.
        positive, negative: points asked for in a PPG reply.
        budget: most points *adaptive* asks about per object.
        per_question: points *adaptive* asks about at a time.
        choose_by: which of SAM's masks is taken: the best predicted IoU (the paper), or that plus
            the share of confident points it agrees with.
    """

    strategy: str = "pqpp"
    points: int = 9
    candidates: Literal["grid", "poisson", "jittered"] = "grid"
    thresholds: Thresholds = field(default_factory=Thresholds)
    point_asking: PointAsking | None = None
    verified_boxes: int = 0
    positive: int = 3
    negative: int = 1
    budget: int = 9
    per_question: int = 3
    choose_by: Literal["predicted_iou", "agreement"] = "predicted_iou"


@dataclass(frozen=True)
class ScoredBox:
    """A box in pixels; ``score`` is the geometric mean probability of its free tokens, 0…1."""

    box: Box
    score: float | None = None


@dataclass(frozen=True)
class LocatedObject:
    """One object of round 1, with prompt points if the strategy got them in the same reply."""

    box: Box
    score: float | None = None
    alternates: tuple[ScoredBox, ...] = ()
    points: tuple[PromptPoint, ...] = ()


@dataclass(frozen=True)
class Location:
    """Round 1's outcome; ``dialogue`` goes on in round 2."""

    expression: str
    count: TargetCount
    dialogue: Dialogue
    objects: tuple[LocatedObject, ...]
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """Found, or not found: both are results."""
        return Status.FOUND if self.objects else Status.NOT_FOUND


@dataclass(frozen=True)
class SegmentedObject:
    """An object with its mask, and the box and points that led to it."""

    located: LocatedObject
    points: tuple[PromptPoint, ...]
    drawn: MaskCandidate

    @property
    def mask(self) -> Mask:
        """The mask, at the size of the image."""
        return self.drawn.mask


@dataclass(frozen=True)
class Segmentation:
    """The result of one query."""

    location: Location
    objects: tuple[SegmentedObject, ...]
    trace: Trace

    @property
    def status(self) -> Status:
        """Found, or not found: both are results."""
        return self.location.status

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the result."""
        return self.location.notes
