"""What the tools share when they report images and objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import LocatedObject, Location
from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.tools.schemas import ObjectSummary
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord
from sam4mllm_tool.types import Mask, PointLabel, PromptPoint

Status = Literal["ok", "found", "not_found"]


def header(
    record: ImageRecord, status: Status, text: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of an :class:`~sam4mllm_tool.tools.schemas.ImageResult`; notes end the text."""
    lines = [text, *(f"Note: {note}." for note in notes)]
    size = f"{record.image.width}x{record.image.height}"
    return {
        "status": status,
        "image_id": record.image_id,
        "image_width": record.image.width,
        "image_height": record.image.height,
        "text": f"{record.image_id} ({size}): " + "\n".join(lines),
        "notes": list(notes),
    }


def objects_header(
    record: ImageRecord, location: Location | None, summaries: Sequence[ObjectSummary]
) -> dict[str, Any]:
    """The header of a result that lists objects, or says that nothing was found."""
    notes = (*record.notes, *(location.notes if location else ()))
    if summaries or location is None:
        text = "\n".join(object_line(summary) for summary in summaries)
        if any(summary.area is None for summary in summaries):
            text += "\nNext: is_point_inside_object, then segment_with_prompts."
        return header(record, "found", text, notes)
    text = (
        f"Nothing in {record.image_id} matches {location.expression!r}. "
        "Try a simpler or more general expression."
    )
    return header(record, "not_found", text, notes)


def summary(frame: Frame, one: ObjectRecord) -> ObjectSummary:
    """An object with its numbers in the agent's coordinates."""
    labels = [point.label for point in one.points]
    size = frame.width * frame.height
    return ObjectSummary(
        object_id=one.object_id,
        name=one.name,
        box=frame.box_out(one.box),
        score=rounded(one.score),
        area=one.mask.area if one.mask else None,
        area_fraction=round(one.mask.area / size, 5) if one.mask else None,
        predicted_iou=rounded(one.drawn.predicted_iou) if one.drawn else None,
        points_inside=labels.count(PointLabel.FOREGROUND),
        points_outside=labels.count(PointLabel.BACKGROUND),
        points_undecided=labels.count(PointLabel.UNDECIDED),
    )


def object_line(one: ObjectSummary) -> str:
    """An object in one line."""
    parts = [f"{one.object_id} '{one.name[:80]}' box {one.box}"]
    if one.score is not None:
        parts.append(f"score {one.score:.2f}")
    if one.area is not None:
        parts.append(f"mask {one.area} px ({100 * (one.area_fraction or 0):.1f}% of the image)")
    if one.predicted_iou is not None:
        parts.append(f"predicted IoU {one.predicted_iou:.2f}")
    if one.points_inside or one.points_outside or one.points_undecided:
        parts.append(
            f"points {one.points_inside} inside, {one.points_outside} outside, "
            f"{one.points_undecided} undecided"
        )
    return ", ".join(parts)


def quoted(one: ObjectRecord) -> str:
    """An object's handle with its name."""
    return f"{one.object_id} ({one.name[:60]})"


def rounded(value: float | None) -> float | None:
    """A number short enough for a prompt."""
    return None if value is None else round(float(value), 4)


def located_record(record: ImageRecord, location: Location, found: LocatedObject) -> ObjectRecord:
    """What the workspace keeps of an object that round 1 found.

    The picture is kept by its own handle, within the workspace's bound on bytes, and not here.
    """
    return ObjectRecord(
        image_id=record.image_id,
        name=location.expression,
        box=found.box,
        score=found.score,
        location=replace(location, image=None),
        points=found.points,
    )


def merged_points(
    former: tuple[PromptPoint, ...], new: tuple[PromptPoint, ...]
) -> tuple[PromptPoint, ...]:
    """Former points and new ones; a new label replaces the former one at the same place."""
    return tuple({(p.x, p.y): p for p in (*former, *new)}.values())


def changed_thresholds(base: Thresholds, p_yes: float | None, p_no: float | None) -> Thresholds:
    """Thresholds with the ones that the agent gave."""
    return Thresholds(
        background=base.background if p_no is None else p_no,
        foreground=base.foreground if p_yes is None else p_yes,
    )


def mask_of(one: ObjectRecord) -> Mask:
    """The mask of an object that is known to have one."""
    assert one.mask is not None
    return one.mask
