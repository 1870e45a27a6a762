"""``save_objects``: masks, COCO JSON and an overlay, written to an allowed folder."""

from __future__ import annotations

from pydantic import Field

from sam4mllm_tool.masks.files import FileFormat, save_masks
from sam4mllm_tool.tools.output import header
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import ImageResult, ToolArguments
from sam4mllm_tool.tools.workspace import labelled_masks


class SaveObjectsArguments(ToolArguments):
    """Arguments of ``save_objects``."""

    object_ids: list[str] = Field(min_length=1, max_length=256, description="Objects with masks.")
    folder: str = Field(description="Folder to write to; must be an allowed one.")
    formats: list[FileFormat] = Field(
        default=["png", "coco_rle", "overlay"],
        description="'png' one mask file per object, 'coco_rle' or 'coco_polygons' one COCO JSON "
        "file, 'overlay' one picture with all masks.",
    )


class SaveResult(ImageResult):
    """Files that were written."""

    files: list[str]


def save_objects(context: ToolContext, arguments: SaveObjectsArguments) -> ToolOutput:
    """Write the files and list their paths."""
    record, found = context.masked_objects(arguments.object_ids)
    paths = save_masks(
        labelled_masks(found),
        record.image,
        arguments.folder,
        arguments.formats,
        context.workspace.policy,
        stem=record.image_id,
        file_name=record.file_name,
    )
    files = [str(path) for path in paths]
    text = f"Wrote {len(files)} files: " + ", ".join(files)
    return ToolOutput(SaveResult(**header(record, "ok", text), files=files))


SAVE_OBJECTS = ToolSpec(
    "save_objects",
    "Write masks as PNG, COCO JSON (RLE or polygons) and an overlay picture to an allowed "
    "folder; returns the paths.",
    SaveObjectsArguments,
    SaveResult,
    save_objects,
    read_only=False,
    needs_model=False,
)
