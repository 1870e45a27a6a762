"""Settings and results of the flow: plain frozen values that display themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from sam4mllm_tool import display
from sam4mllm_tool.drawing.notebook import result_html, small_picture
from sam4mllm_tool.drawing.overlay import overlay
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.formats.base import PointAsking
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.masks.interop import LabelledMask, to_detections
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.protocols import Dialogue, MaskCandidate, Verification
from sam4mllm_tool.types import Box, Mask, PromptPoint, RgbImage, Status, TargetCount

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class Settings:
    """Settings of the dialogue.

    Attributes:
        strategy: name of a built-in strategy, see :mod:`sam4mllm_tool.pipeline.strategies`.
        points: candidate points per box in round 2.
        candidates: how they are spread over the box: an even "grid", "poisson" disk (the authors'
            training), or a "jittered" grid (their demo, with ``points=15``).
        thresholds: which answers count.
        point_asking: points named by coordinates, or by numbered marks drawn on the picture (one
            extra image for all points); ``None`` = as the dialogue format prefers.
        verified_boxes: if above 1, that many candidate boxes are verified and the surest is taken,
            if one object is found.
        verification: boxes are verified by a yes/no question ("does this region show …?"), or by
            the share of the MLLM's own answers that agree ("posterior"); ``None`` = as suits the
            checkpoint.
        positive, negative: points asked for in a PPG reply.
        proposals: most candidates *propose* judges.
        choose_by: which of SAM's masks is taken: the best predicted IoU (the paper), or that plus
            the share of confident points it agrees with.
    """

    strategy: str = "pqpp"
    points: int = 9
    candidates: str = "grid"
    thresholds: Thresholds = field(default_factory=Thresholds)
    point_asking: PointAsking | None = None
    verified_boxes: int = 0
    verification: Verification | None = None
    positive: int = 3
    negative: int = 1
    proposals: int = 8
    choose_by: Literal["predicted_iou", "agreement"] = "predicted_iou"


@dataclass(frozen=True)
class ScoredBox:
    """A box in pixels, with the MLLM's confidence in it.

    Attributes:
        score: probability that the box is right (IoU of at least 0.5 with a target), where the
            checkpoint states a calibration; ``None`` elsewhere.
        likelihood: geometric mean probability of the reply's free tokens. It orders the boxes of
            one question; it is no probability (right boxes have .02 to .2), and ``None`` where a
            backend does not return probabilities.
    """

    box: Box
    score: float | None = None
    likelihood: float | None = None


@dataclass(frozen=True)
class LocatedObject(ScoredBox):
    """One object of round 1, with prompt points if the strategy got them in the same reply."""

    alternates: tuple[ScoredBox, ...] = ()
    points: tuple[PromptPoint, ...] = ()


@dataclass(frozen=True)
class Location:
    """Outcome of round 1; round 2 continues ``dialogue``.

    Attributes:
        image: the picture that was asked about, for display.
    """

    expression: str
    count: TargetCount
    dialogue: Dialogue
    objects: tuple[LocatedObject, ...]
    notes: tuple[str, ...] = ()
    image: RgbImage | None = field(default=None, repr=False, compare=False)

    @property
    def status(self) -> Status:
        """Found, or not found: both are results."""
        return Status.FOUND if self.objects else Status.NOT_FOUND

    def to_pil(self) -> Image.Image:
        """The picture with the boxes (and points, if the reply held any), at full size.

        Raises:
            InputError: the location was made without its picture.
        """
        return overlay(_known(self.image), self._boxes())

    def show(self) -> None:
        """In a notebook as the cell's output, else in the desktop's viewer."""
        display.show(self, self.to_pil())

    def _boxes(self) -> list[dict[str, Any]]:
        return [
            {"box": list(one.box), "score": one.score, "points": _points_data(one.points)}
            for one in self.objects
        ]

    def _repr_html_(self) -> str:
        return result_html(
            self.expression,
            _found_text(len(self.objects)),
            small_picture(self.image, _size(self.image), self._boxes()),
            self._boxes(),
            dialogue=[{"role": turn.role, "text": turn.text} for turn in self.dialogue],
            notes=self.notes,
        )


@dataclass(frozen=True)
class SegmentedObject:
    """An object with its mask, and the box and points that led to it.

    Attributes:
        image: the picture that it is part of, for display.
        expression: what was asked for; its name in other libraries' values.
    """

    located: LocatedObject
    points: tuple[PromptPoint, ...]
    drawn: MaskCandidate
    image: RgbImage | None = field(default=None, repr=False, compare=False)
    expression: str = "object"

    @property
    def mask(self) -> Mask:
        """The mask, at the size of the image."""
        return self.drawn.mask

    def data(self, object_id: str = "obj_1") -> dict[str, Any]:
        """JSON-ready, as a trace holds it: the mask as COCO RLE, box and points in pixels."""
        return {
            "object_id": object_id,
            "box": list(self.located.box),
            "score": self.located.score,
            "likelihood": self.located.likelihood,
            "points": _points_data(self.points),
            "mask": self.mask.to_rle(),
            "predicted_iou": self.drawn.predicted_iou,
            "area": self.mask.area,
        }

    def to_pil(self) -> Image.Image:
        """The picture with this object's mask, box and points, at full size.

        Raises:
            InputError: the object was made without its picture.
        """
        return overlay(_known(self.image), [self.data()])

    def to_coco(self, file_name: str = "", *, polygons: bool = False) -> dict[str, Any]:
        """A COCO document of the picture with this object alone.

        Args:
            file_name: what it calls the picture.
            polygons: the mask as polygons instead of RLE.

        Raises:
            InputError: the object was made without its picture.
        """
        return masks_to_coco([self._labelled()], _known(self.image), file_name, polygons=polygons)

    def to_supervision(self) -> supervision.Detections:
        """``supervision.Detections`` of length 1: mask, box, score and ``class_name``.

        Raises:
            ImportError: the extra ``supervision`` is not installed.
        """
        return to_detections([self._labelled()])

    def _labelled(self) -> LabelledMask:
        return LabelledMask(self.expression, self.mask, self.located.score, "obj_1")

    def show(self) -> None:
        """In a notebook as the cell's output, else in the desktop's viewer."""
        display.show(self, self._small())

    def _small(self) -> Image.Image:
        return small_picture(self.image, (self.mask.width, self.mask.height), [self.data()])

    def _repr_html_(self) -> str:
        return result_html(
            self.expression, f"{self.mask.area} pixels", self._small(), [self.data()]
        )


@dataclass(frozen=True)
class Segmentation:
    """The result of one query.

    Attributes:
        image: the picture that was asked about.
    """

    location: Location
    objects: tuple[SegmentedObject, ...]
    trace: Trace = field(repr=False)
    image: RgbImage = field(repr=False)

    @property
    def status(self) -> Status:
        """Found, or not found: both are results."""
        return self.location.status

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the result."""
        return self.location.notes

    def to_masks(self) -> list[LabelledMask]:
        """The masks with the expression as their name, for :mod:`sam4mllm_tool.masks.interop`."""
        return [
            LabelledMask(self.location.expression, one.mask, one.located.score, f"obj_{number}")
            for number, one in enumerate(self.objects, 1)
        ]

    def to_pil(self) -> Image.Image:
        """The picture with masks, boxes and points, at full size."""
        return overlay(self.image, self.trace.objects)

    def to_coco(self, file_name: str = "", *, polygons: bool = False) -> dict[str, Any]:
        """A COCO document of this picture.

        Args:
            file_name: what it calls the picture; by default what the trace does.
            polygons: masks as polygons instead of RLE.
        """
        name = file_name or self.trace.image["source"]
        return masks_to_coco(self.to_masks(), self.image, name, polygons=polygons)

    def to_supervision(self) -> supervision.Detections:
        """``supervision.Detections`` with masks, boxes, scores and ``class_name``.

        Raises:
            ImportError: the extra ``supervision`` is not installed.
        """
        return to_detections(self.to_masks())

    def show(self) -> None:
        """In a notebook as the cell's output, else in the desktop's viewer."""
        display.show(self, self._small())

    def _small(self) -> Image.Image:
        return small_picture(self.image, self.image.size, self.trace.objects)

    def _repr_png_(self) -> bytes:
        return display.encoded(self._small(), "PNG")

    def _repr_html_(self) -> str:
        return self.trace.html(self.image)


def _points_data(points: Iterable[PromptPoint]) -> list[dict[str, Any]]:
    return [{**asdict(point), "label": point.label.value} for point in points]


def _known(image: RgbImage | None) -> RgbImage:
    if image is None:
        raise InputError(
            "this value was made without its picture",
            hint="Take it from Sam4MLLM.segment() or locate().",
        )
    return image


def _size(image: RgbImage | None) -> tuple[int, int]:
    return image.size if image else (1, 1)


def _found_text(number: int) -> str:
    return f"{number} found" if number else "not found"
