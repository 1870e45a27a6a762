"""``segment_object``: expression → masks in one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from sam4mllm_tool.tools.output import (
    changed_thresholds,
    located_record,
    mask_of,
    objects_header,
    summary,
)
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import (
    Count,
    Expression,
    ImageSource,
    InsideThreshold,
    ObjectsResult,
    OutsideThreshold,
    ToolArguments,
)
from sam4mllm_tool.types import TargetCount


class SegmentObjectArguments(ToolArguments):
    """Arguments of ``segment_object``."""

    image: ImageSource
    expression: Expression
    count: Count = TargetCount.ZERO_OR_MORE
    strategy: Literal["pqpp", "ppg", "adaptive", "box_only", "propose"] | None = Field(
        None,
        description="'pqpp' asks for a box, then whether points lie on the object (the default); "
        "'ppg' asks for box and points at once; 'adaptive' asks about those points only that lie "
        "well inside the box's mask; 'box_only' is fastest; 'propose' finds every candidate "
        "first, then asks which are meant.",
    )
    points: int | None = Field(
        None, ge=1, le=100, description="How many points to ask about (default 9)."
    )
    p_yes_above: InsideThreshold = None
    p_no_above: OutsideThreshold = None


def segment_object(context: ToolContext, arguments: SegmentObjectArguments) -> ToolOutput:
    """Find, ask about points, draw; every object gets a handle."""
    record = context.workspace.open_image(arguments.image)
    settings = context.model.settings
    settings = replace(
        settings,
        strategy=arguments.strategy or settings.strategy,
        points=arguments.points or settings.points,
        thresholds=changed_thresholds(
            settings.thresholds, arguments.p_yes_above, arguments.p_no_above
        ),
    )
    found = replace(context.model, settings=settings).segment(
        record.image, arguments.expression, count=arguments.count, source=record.source
    )
    kept = [
        context.workspace.add_object(
            replace(
                located_record(record, found.location, one.located),
                points=one.points,
                drawn=one.drawn if one.drawn.logits is not None else None,
                mask=one.mask,
            )
        )
        for one in found.objects
    ]
    summaries = [summary(context.frame(record), one) for one in kept]
    result = ObjectsResult(
        **objects_header(record, found.location, summaries),
        objects=summaries,
        questions=found.trace.questions,
    )
    masks = {one.object_id: mask_of(one) for one in kept}
    return ToolOutput(result, masks=masks, trace=found.trace)


SEGMENT_OBJECT = ToolSpec(
    "segment_object",
    "Find the object(s) an expression describes and return pixel masks, in one call. Use it "
    "first for any 'which pixels' question. Masks stay in the workspace under object_ids; "
    "pass these to the other tools. On not_found, try a simpler expression. "
    "If a mask looks wrong, check points with is_point_inside_object and refine with "
    "segment_with_prompts.",
    SegmentObjectArguments,
    ObjectsResult,
    segment_object,
    has_coordinates=True,
)
