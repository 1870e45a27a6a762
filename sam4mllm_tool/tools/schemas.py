"""Arguments and results of the tools: the one place where their schemas are written.

Whether numbers are pixels or thousandths of the image's sides is the toolkit's choice (see
``tools.Toolbox``), said in every tool's description.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sam4mllm_tool.types import PointLabel, Strategy, TargetCount

ImageSource = Annotated[
    str,
    Field(
        min_length=1,
        description="The image: a file path, a URL (where allowed), a data URI, or an image_id "
        "(img_…) from an earlier result.",
    ),
]
Expression = Annotated[
    str,
    Field(
        description="What to find, as a short noun phrase: 'the red apple left of the dog', "
        "'all cups', 'what you would cut paper with'."
    ),
]
Count = Annotated[
    TargetCount,
    Field(
        description="How many objects the expression may mean: '1' exactly one (always answers), "
        "'1+' one or more, '0+' none, one or more (can answer not_found)."
    ),
]
ObjectId = Annotated[str, Field(description="An object_id (obj_…) from an earlier result.")]
BoxNumbers = Annotated[
    list[float],
    Field(min_length=4, max_length=4, description="[x_min, y_min, x_max, y_max]"),
]


class Arguments(BaseModel):
    """Base of all tool arguments: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PointArgument(Arguments):
    """A point in the image."""

    x: float = Field(description="Distance from the left edge.")
    y: float = Field(description="Distance from the top edge.")


class LabelledPointArgument(PointArgument):
    """A point that is known to be on or off the object."""

    label: Literal["foreground", "background"] = Field(
        description="'foreground' = on the object, 'background' = not on it."
    )


class SegmentObjectArguments(Arguments):
    """Arguments of ``segment_object``."""

    image: ImageSource
    expression: Expression
    count: Count = TargetCount.ZERO_OR_MORE
    strategy: Strategy | None = Field(
        None,
        description="'pqpp' asks for a box, then whether points lie on the object (the default); "
        "'ppg' asks for box and points at once; 'adaptive' asks where the mask is unsure; "
        "'box_only' is fastest.",
    )
    points: int | None = Field(
        None, ge=1, le=100, description="How many points to ask about (default 9)."
    )
    p_yes_above: float | None = Field(
        None, ge=0, le=1, description="A point counts as inside above this p_yes (default 0.75)."
    )
    p_no_above: float | None = Field(
        None, ge=0, le=1, description="A point counts as outside above this p_no (default 0.9)."
    )


class LocateObjectArguments(Arguments):
    """Arguments of ``locate_object``."""

    image: ImageSource
    expression: Expression
    count: Count = TargetCount.ZERO_OR_MORE
    alternates: int = Field(
        0, ge=0, le=8, description="How many other likely boxes to return, with scores."
    )


class IsPointInsideObjectArguments(Arguments):
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
    p_yes_above: float | None = Field(
        None, ge=0, le=1, description="A point counts as inside above this p_yes (default 0.75)."
    )
    p_no_above: float | None = Field(
        None, ge=0, le=1, description="A point counts as outside above this p_no (default 0.9)."
    )

    @model_validator(mode="after")
    def _one_way_to_name_the_object(self) -> IsPointInsideObjectArguments:
        if self.object_id is None and (self.image is None or self.expression is None):
            raise ValueError("give object_id, or image and expression")
        if self.object_id is not None and self.expression is not None:
            raise ValueError("give either object_id or expression, not both")
        return self


class SegmentWithPromptsArguments(Arguments):
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


class CompareObjectsArguments(Arguments):
    """Arguments of ``compare_objects``."""

    object_ids: list[str] = Field(
        min_length=2, max_length=16, description="Objects of one image that have masks."
    )
    combine: Literal["union", "intersect", "subtract"] | None = Field(
        None,
        description="Also make a new object: all pixels (union), shared pixels (intersect), or "
        "the first without the others (subtract).",
    )


class ViewObjectsArguments(Arguments):
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


class SaveObjectsArguments(Arguments):
    """Arguments of ``save_objects``."""

    object_ids: list[str] = Field(min_length=1, max_length=256, description="Objects with masks.")
    folder: str = Field(description="Folder to write to; must be an allowed one.")
    formats: list[Literal["png", "coco_rle", "coco_polygons", "overlay"]] = Field(
        default=["png", "coco_rle", "overlay"],
        description="'png' one mask file an object, 'coco_rle' or 'coco_polygons' one COCO JSON "
        "file, 'overlay' one picture with all masks.",
    )


class ObjectSummary(BaseModel):
    """What an agent is told about an object."""

    object_id: str
    name: str = Field(description="The expression, or how the object was made.")
    box: list[float] = Field(description="[x_min, y_min, x_max, y_max]")
    score: float | None = Field(None, description="Confidence of the box, 0 to 1.")
    area: int | None = Field(None, description="Mask area in pixels; null if no mask is drawn yet.")
    area_fraction: float | None = Field(None, description="Mask area as a share of the image.")
    predicted_iou: float | None = Field(None, description="SAM's own estimate of mask quality.")
    points_inside: int = 0
    points_outside: int = 0
    points_undecided: int = 0


class AlternateBox(BaseModel):
    """Another box the expression may have meant."""

    box: list[float]
    score: float | None = None


class ToolResult(BaseModel):
    """What every result carries."""

    status: Literal["ok", "found", "not_found"]
    image_id: str
    image_width: int = Field(description="pixels")
    image_height: int = Field(description="pixels")
    text: str = Field(description="The result in words.")
    notes: list[str] = Field(default=[], description="What a reader should know.")


class ObjectsResult(ToolResult):
    """Objects with boxes and, once drawn, masks (masks stay in the workspace)."""

    objects: list[ObjectSummary] = []
    questions: int = Field(0, description="Questions the model was asked.")


class LocateResult(ObjectsResult):
    """Objects with boxes; other likely boxes of the first object."""

    alternates: list[AlternateBox] = []


class PointResult(BaseModel):
    """The answer for one point."""

    x: float
    y: float
    answer: Literal["inside", "outside", "undecided"]
    p_yes: float
    p_no: float
    in_mask: bool | None = Field(None, description="Whether the object's mask covers the point.")
    disagrees: bool = Field(False, description="Whether answer and mask contradict each other.")


class PointsResult(ToolResult):
    """Answers in the order of the points."""

    object_id: str | None = None
    points: list[PointResult] = []


class PairComparison(BaseModel):
    """How object a lies to object b."""

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


class ComparisonResult(ToolResult):
    """Areas and pairwise relations, and the combined object if one was asked for."""

    objects: list[ObjectSummary]
    pairs: list[PairComparison]
    combined: ObjectSummary | None = None


class ViewResult(ToolResult):
    """A picture for a multimodal reader travels beside this result."""

    shown: dict[int, str] = Field(description="Number in the picture → object_id.")
    view_width: int
    view_height: int


class SaveResult(ToolResult):
    """Files that were written."""

    files: list[str]


Answer = Literal["inside", "outside", "undecided"]
ANSWER: dict[PointLabel, Answer] = {
    PointLabel.FOREGROUND: "inside",
    PointLabel.BACKGROUND: "outside",
    PointLabel.UNDECIDED: "undecided",
}
