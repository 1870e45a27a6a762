"""``locate_object``: round 1, expression → boxes."""

from __future__ import annotations

from pydantic import BaseModel, Field

from sam4mllm_tool.tools.output import located_record, objects_header, rounded, summary
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import (
    Count,
    Expression,
    ImageSource,
    ObjectsResult,
    ToolArguments,
)
from sam4mllm_tool.types import TargetCount


class LocateObjectArguments(ToolArguments):
    """Arguments of ``locate_object``."""

    image: ImageSource
    expression: Expression
    count: Count = TargetCount.ZERO_OR_MORE
    alternates: int = Field(
        0, ge=0, le=8, description="How many other likely boxes to return, likeliest first."
    )


class AlternateBox(BaseModel):
    """Another box the expression may have meant."""

    box: list[float]
    score: float | None = Field(
        None, description="Probability that the box is right; null if the model cannot tell."
    )


class LocateResult(ObjectsResult):
    """Objects with boxes; other likely boxes of the first object."""

    alternates: list[AlternateBox] = Field(default=[])


def locate_object(context: ToolContext, arguments: LocateObjectArguments) -> ToolOutput:
    """Find boxes; every object gets a handle, without a mask yet."""
    record = context.workspace.open_image(arguments.image)
    location = context.model.locate(
        record.image, arguments.expression, arguments.count, alternates=arguments.alternates
    )
    kept = [
        context.workspace.add_object(located_record(record, location, found))
        for found in location.objects
    ]
    frame = context.frame(record)
    others = location.objects[0].alternates if location.objects else ()
    alternates = [AlternateBox(box=frame.box_out(o.box), score=rounded(o.score)) for o in others]
    summaries = [summary(frame, one) for one in kept]
    header = objects_header(record, location, summaries)
    for other in alternates:
        score = "" if other.score is None else f", score {other.score:.2f}"
        header["text"] += f"\nOther box: {other.box}{score}"
    return ToolOutput(LocateResult(**header, objects=summaries, questions=1, alternates=alternates))


LOCATE_OBJECT = ToolSpec(
    "locate_object",
    "Find the object(s) an expression describes and return boxes only: the cheap first step "
    "when you need no mask, want other likely boxes, or want to go step by step. Next: "
    "is_point_inside_object, then segment_with_prompts with the object_id.",
    LocateObjectArguments,
    LocateResult,
    locate_object,
    has_coordinates=True,
)
