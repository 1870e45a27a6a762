"""``compare_objects``: areas, overlaps, distances and positions; a combined object on request."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

from pydantic import BaseModel, Field

from sam4mllm_tool.masks.relations import (
    combine,
    mask_distance,
    mask_iou,
    relative_position,
    share_inside,
)
from sam4mllm_tool.tools.coordinates import Frame
from sam4mllm_tool.tools.output import header, mask_of, object_line, summary
from sam4mllm_tool.tools.registry import ToolContext, ToolOutput, ToolSpec
from sam4mllm_tool.tools.schemas import ImageResult, ObjectSummary, ToolArguments
from sam4mllm_tool.tools.workspace import ObjectRecord
from sam4mllm_tool.types import Box


class CompareObjectsArguments(ToolArguments):
    """Arguments of ``compare_objects``."""

    object_ids: list[str] = Field(
        min_length=2, max_length=16, description="Objects of one image that have masks."
    )
    combine: Literal["union", "intersect", "subtract"] | None = Field(
        None,
        description="Also make a new object: all pixels (union), shared pixels (intersect), or "
        "the first without the others (subtract).",
    )


class PairComparison(BaseModel):
    """Object a's relation to object b."""

    a: str
    b: str
    iou: float
    a_inside_b: float = Field(description="Share of a's pixels that b covers too.")
    b_inside_a: float = Field(description="Share of b's pixels that a covers too.")
    distance: float | None = Field(
        description="Smallest distance between the masks, 0 if they touch; null if one is empty."
    )
    position: list[Literal["left_of", "right_of", "above", "below", "overlapping"]] = Field(
        description="Where a lies as seen from b, by mask centroids."
    )


class ComparisonResult(ImageResult):
    """Areas and pairwise relations, and the combined object if one was asked for."""

    objects: list[ObjectSummary]
    pairs: list[PairComparison]
    combined: ObjectSummary | None = None


def compare_objects(context: ToolContext, arguments: CompareObjectsArguments) -> ToolOutput:
    """Compare every pair; keep the combination as an object of its own."""
    record, found = context.masked_objects(arguments.object_ids)
    frame = context.frame(record)
    pairs = [_compare(frame, a, b) for a, b in combinations(found, 2)]
    combined = None
    if arguments.combine:
        mask = combine(arguments.combine, [mask_of(one) for one in found])
        combined = context.workspace.add_object(
            ObjectRecord(
                image_id=record.image_id,
                name=f"{arguments.combine} of {', '.join(arguments.object_ids)}",
                box=mask.box or Box(0, 0, 0, 0),
                mask=mask,
            )
        )
    objects = [summary(frame, one) for one in found]
    new = [] if combined is None else [summary(frame, combined)]
    lines = [object_line(one) for one in objects]
    lines += [_pair_line(pair) for pair in pairs]
    lines += [f"New: {object_line(one)}" for one in new]
    return ToolOutput(
        ComparisonResult(
            **header(record, "ok", "\n".join(lines)),
            objects=objects,
            pairs=pairs,
            combined=new[0] if new else None,
        ),
        masks={combined.object_id: mask_of(combined)} if combined else {},
    )


def _compare(frame: Frame, a: ObjectRecord, b: ObjectRecord) -> PairComparison:
    one, other = mask_of(a), mask_of(b)
    return PairComparison(
        a=a.object_id,
        b=b.object_id,
        iou=round(mask_iou(one, other), 4),
        a_inside_b=round(share_inside(one, other), 4),
        b_inside_a=round(share_inside(other, one), 4),
        distance=frame.length_out(mask_distance(one, other)) if one.area and other.area else None,
        position=relative_position(one, other),
    )


def _pair_line(pair: PairComparison) -> str:
    """The relation of two objects, in one line."""
    if pair.distance is None:
        return f"{pair.a} and {pair.b} have no relation: one of the masks is empty"
    where = " and ".join(side.replace("_", " ") for side in pair.position) or "at the same place as"
    return (
        f"{pair.a} is {where} {pair.b}: IoU {pair.iou:.2f}, "
        f"{100 * pair.a_inside_b:.0f}% of {pair.a} in {pair.b}, gap {pair.distance:g}"
    )


COMPARE_OBJECTS = ToolSpec(
    "compare_objects",
    "Compare objects of one image: areas, overlap (IoU), containment, distance, relative "
    "position; optionally make a new object as union, intersection or difference.",
    CompareObjectsArguments,
    ComparisonResult,
    compare_objects,
    has_coordinates=True,
    needs_model=False,
)
