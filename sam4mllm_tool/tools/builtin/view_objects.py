"""``view_objects``: a bounded picture with numbered masks."""

from __future__ import annotations

from pydantic import Field, model_validator

from sam4mllm_tool.drawing.overlay import numbered_view
from sam4mllm_tool.tools.output import header, mask_of, quoted
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import ImageResult, ToolArguments


class ViewObjectsArguments(ToolArguments):
    """Arguments of ``view_objects``."""

    image: str | None = Field(None, description="Image to show; needed if no object_ids are given.")
    object_ids: list[str] | None = Field(
        None, description="Objects to mark; all of the image's objects if left out."
    )
    crop: bool = Field(False, description="Show only the part around the objects.")
    max_side: int = Field(768, ge=64, le=2048, description="Longest side of the picture in pixels.")

    @model_validator(mode="after")
    def _something_to_show(self) -> ViewObjectsArguments:
        if self.image is None and not self.object_ids:
            raise ValueError("give image or object_ids")
        return self


class ViewResult(ImageResult):
    """The numbers in the picture; the picture itself is returned beside this result."""

    shown: dict[int, str] = Field(description="Number in the picture → object_id.")
    view_width: int
    view_height: int


def view_objects(context: ToolContext, arguments: ViewObjectsArguments) -> ToolOutput:
    """Draw masks, each with the number of its handle."""
    workspace = context.workspace
    if arguments.object_ids:
        record, found = context.masked_objects(arguments.object_ids)
    else:
        record = workspace.open_image(arguments.image)
        found = [one for one in workspace.objects(record.image_id) if one.mask is not None]
    picture = numbered_view(
        record.image,
        {one.number: mask_of(one) for one in found},
        crop=arguments.crop,
        max_side=arguments.max_side,
    )
    marked = ", ".join(f"{one.number} = {quoted(one)}" for one in found)
    text = f"Picture of {record.image_id}, {picture.width}x{picture.height}. " + (
        f"Marked: {marked}." if found else "It has no objects with masks yet."
    )
    result = ViewResult(
        **header(record, "ok", text),
        shown={one.number: one.object_id for one in found},
        view_width=picture.width,
        view_height=picture.height,
    )
    return ToolOutput(result, picture=picture)


VIEW_OBJECTS = ToolSpec(
    "view_objects",
    "Get a picture of the image with numbered masks, whole or cropped, to check results "
    "with your own eyes.",
    ViewObjectsArguments,
    ViewResult,
    view_objects,
    returns_picture=True,
    needs_model=False,
)
