"""``is_point_inside_object``: round 2, is each point on the object?"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.tools.output import (
    changed_thresholds,
    header,
    located_record,
    merged_points,
    objects_header,
    quoted,
)
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import (
    ImageResult,
    InsideThreshold,
    OutsideThreshold,
    PointArgument,
    ToolArguments,
)
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord
from sam4mllm_tool.types import Mask, Point, PointLabel, PromptPoint, TargetCount

MOST_LINES = 40

Answer = Literal["inside", "outside", "undecided"]
_ANSWERS: dict[PointLabel, Answer] = {
    PointLabel.FOREGROUND: "inside",
    PointLabel.BACKGROUND: "outside",
    PointLabel.UNDECIDED: "undecided",
}


class IsPointInsideObjectArguments(ToolArguments):
    """Arguments of ``is_point_inside_object``."""

    object_id: str | None = Field(
        None, description="An object from locate_object or segment_object. Or give image + "
        "expression instead, and the object is located first."
    )  # fmt: skip
    image: str | None = Field(None, description="Image to locate the expression in.")
    expression: str | None = Field(None, description="What to find, if no object_id is given.")
    points: list[PointArgument] | None = Field(
        None, description="Points to ask about; leave out to ask about an even grid over the box."
    )
    p_yes_above: InsideThreshold = None
    p_no_above: OutsideThreshold = None

    @model_validator(mode="after")
    def _one_way_to_name_the_object(self) -> IsPointInsideObjectArguments:
        if self.object_id is None and (self.image is None or self.expression is None):
            raise ValueError("give object_id, or image and expression")
        if self.object_id is not None and self.expression is not None:
            raise ValueError("give either object_id or expression, not both")
        return self


class PointResult(BaseModel):
    """The answer for one point."""

    x: float
    y: float
    answer: Answer
    p_yes: float
    p_no: float
    in_mask: bool | None = Field(None, description="Whether the object's mask covers the point.")
    disagrees: bool = Field(False, description="Whether answer and mask contradict each other.")


class PointsResult(ImageResult):
    """Answers in the order of the points."""

    object_id: str | None = None
    points: list[PointResult] = Field(default=[])


def is_point_inside_object(
    context: ToolContext, arguments: IsPointInsideObjectArguments
) -> ToolOutput:
    """Ask about points of an object; the answers are kept with it."""
    record, found = _object_asked_about(context, arguments)
    if isinstance(found, ToolOutput):
        return found
    frame = context.frame(record)
    # An object that no expression found has no dialogue: its box stands in for the reply.
    location = found.location or context.model.stated(record.image, found.name, found.box)
    points = (
        None if arguments.points is None else [frame.point_in(p.x, p.y) for p in arguments.points]
    )
    thresholds = changed_thresholds(
        context.model.settings.thresholds, arguments.p_yes_above, arguments.p_no_above
    )
    answers = context.model.check_points(
        record.image, location, found.box, points, thresholds=thresholds
    )
    kept = replace(found, points=merged_points(found.points, answers))
    context.workspace.update_object(kept)
    results = [_point_result(frame, answer, found.mask) for answer in answers]
    text = _points_text(quoted(found), results)
    return ToolOutput(
        PointsResult(
            **header(record, "ok", text, location.notes),
            object_id=found.object_id,
            points=results,
        )
    )


def _object_asked_about(
    context: ToolContext, arguments: IsPointInsideObjectArguments
) -> tuple[ImageRecord, ObjectRecord | ToolOutput]:
    """The named object, or the first one that the expression finds, or that there is none."""
    workspace = context.workspace
    if arguments.object_id is not None:
        found = workspace.object(arguments.object_id)
        return workspace.image(found.image_id), found
    assert arguments.image is not None and arguments.expression is not None  # validated
    record = workspace.open_image(arguments.image)
    location = context.model.locate(record.image, arguments.expression, TargetCount.ZERO_OR_MORE)
    if not location.objects:
        return record, ToolOutput(PointsResult(**objects_header(record, location, [])))
    return record, workspace.add_object(located_record(record, location, location.objects[0]))


def _point_result(frame: Frame, answer: PromptPoint, mask: Mask | None) -> PointResult:
    in_mask = None if mask is None else mask.contains(answer.x, answer.y)
    inside = answer.label is PointLabel.FOREGROUND
    sure = answer.label is not PointLabel.UNDECIDED
    x, y = frame.point_out(Point(answer.x, answer.y))
    return PointResult(
        x=x,
        y=y,
        answer=_ANSWERS[answer.label],
        p_yes=round(answer.p_yes or 0.0, 4),
        p_no=round(answer.p_no or 0.0, 4),
        in_mask=in_mask,
        disagrees=sure and in_mask is not None and in_mask != inside,
    )


def _points_text(name: str, points: list[PointResult]) -> str:
    """Each point with its answer, the first ``MOST_LINES`` of them."""
    lines = [f"{name}:"]
    for p in points[:MOST_LINES]:
        clash = " (the mask disagrees)" if p.disagrees else ""
        lines.append(f"({p.x:g}, {p.y:g}) {p.answer}, p_yes {p.p_yes:.2f}{clash}")
    if len(points) > MOST_LINES:
        lines.append(f"… and {len(points) - MOST_LINES} more in the structured result")
    return "\n".join(lines)


IS_POINT_INSIDE_OBJECT = ToolSpec(
    "is_point_inside_object",
    "Ask the model whether points lie on an object: inside, outside or undecided, with "
    "p_yes and p_no. Leave points out to probe an even grid over the box. Answers are kept "
    "with the object and used by segment_with_prompts. If the object has a mask, in_mask and "
    "disagrees show where mask and answer differ.",
    IsPointInsideObjectArguments,
    PointsResult,
    is_point_inside_object,
    has_coordinates=True,
)
