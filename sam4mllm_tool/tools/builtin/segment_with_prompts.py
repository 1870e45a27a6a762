"""``segment_with_prompts``: box and points (and a former mask) → mask."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from sam4mllm_tool.errors import PromptError
from sam4mllm_tool.geometry import intersection
from sam4mllm_tool.pipeline.validation import check_image_points
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.tools.output import merged_points, objects_header, summary
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import (
    BoxNumbers,
    LabelledPointArgument,
    ObjectsResult,
    ToolArguments,
)
from sam4mllm_tool.tools.workspace import ImageRecord, ObjectRecord
from sam4mllm_tool.types import Box, Point, PromptPoint


class SegmentWithPromptsArguments(ToolArguments):
    """Arguments of ``segment_with_prompts``."""

    object_id: str | None = Field(
        None, description="Object to draw or refine: its box, its answered points and its former "
        "mask are used, and what you give here is added."
    )  # fmt: skip
    image: str | None = Field(None, description="Image, if no object_id is given.")
    box: BoxNumbers | None = Field(
        None, description="[x_min, y_min, x_max, y_max]; replaces the object's box."
    )
    points: list[LabelledPointArgument] = Field(
        default=[], description="Points known to be on or off the object."
    )

    @model_validator(mode="after")
    def _something_to_draw_from(self) -> SegmentWithPromptsArguments:
        if self.object_id is None and self.image is None:
            raise ValueError("give object_id, or image with a box or points")
        if self.object_id is None and self.box is None and not self.points:
            raise ValueError("give a box or at least one point")
        return self


def segment_with_prompts(
    context: ToolContext, arguments: SegmentWithPromptsArguments
) -> ToolOutput:
    """Draw an object's first mask, or a refined one as a new object."""
    workspace = context.workspace
    former = workspace.object(arguments.object_id) if arguments.object_id else None
    record = workspace.image(former.image_id) if former else workspace.open_image(arguments.image)
    frame = context.frame(record)
    box = former.box if former else None
    if arguments.box is not None:
        box = _box_on_image(frame, record, arguments.box)
    given = _labelled_points(frame, record, arguments.points)
    points = merged_points(former.points if former else (), given)
    # Logits of a former mask belong to its box: a new box starts over.
    refines = former is not None and former.drawn is not None and arguments.box is None
    logits = former.drawn.logits if refines and former and former.drawn else None
    drawn = context.model.draw(record.image, [SegmentPrompt(box, points, logits)])[0]
    new = ObjectRecord(
        image_id=record.image_id,
        name=former.name if former else "from prompts",
        box=box or drawn.mask.box or Box(0, 0, 0, 0),
        object_id=former.object_id if former else "",
        score=former.score if former else None,
        location=former.location if former else None,
        points=points,
        drawn=drawn,
        mask=drawn.mask,
    )
    # A mask that was drawn before is kept: refining it makes a new object.
    is_first_mask = former is not None and former.mask is None
    kept = workspace.update_object(new) if is_first_mask else workspace.add_object(new)
    summaries = [summary(frame, kept)]
    result = ObjectsResult(**objects_header(record, None, summaries), objects=summaries)
    return ToolOutput(result, masks={kept.object_id: drawn.mask})


def _box_on_image(frame: Frame, record: ImageRecord, numbers: Sequence[float]) -> Box:
    box = frame.box_in(numbers)
    if intersection(box, Box(0, 0, record.image.width, record.image.height)) is None:
        raise PromptError(
            f"the box {list(numbers)} covers nothing of the image",
            hint="Give [x_min, y_min, x_max, y_max] with x_min < x_max and y_min < y_max.",
        )
    return box


def _labelled_points(
    frame: Frame, record: ImageRecord, points: Sequence[LabelledPointArgument]
) -> tuple[PromptPoint, ...]:
    given = tuple(PromptPoint(*frame.point_in(p.x, p.y), p.point_label) for p in points)
    if given:
        check_image_points([Point(p.x, p.y) for p in given], record.image)
    return given


SEGMENT_WITH_PROMPTS = ToolSpec(
    "segment_with_prompts",
    "Draw or refine a mask from a box and/or labelled points. With an object_id, its box, "
    "answered points and former mask are used too. Refining gives a new object_id and keeps "
    "the old mask.",
    SegmentWithPromptsArguments,
    ObjectsResult,
    segment_with_prompts,
    has_coordinates=True,
)
