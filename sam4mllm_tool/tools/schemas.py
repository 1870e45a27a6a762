"""Argument and result types that the tools share; each tool's own stand in its file.

Whether numbers are pixels or thousandths of the image's sides is the toolbox's choice (see
:class:`~sam4mllm_tool.tools.toolbox.Toolbox`) and part of the tools' descriptions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sam4mllm_tool.types import PointLabel, TargetCount

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
        description="How many objects the expression may mean: '0+' none, one or more (can answer "
        "not_found), '1+' one or more, '1' exactly one (always answers)."
    ),
]
BoxNumbers = Annotated[
    list[float],
    Field(min_length=4, max_length=4, description="[x_min, y_min, x_max, y_max]"),
]
InsideThreshold = Annotated[
    float | None,
    Field(
        ge=0, le=1, description="A point counts as inside above this p_yes (default 0.75)."
    ),
]  # fmt: skip
OutsideThreshold = Annotated[
    float | None,
    Field(ge=0, le=1, description="A point counts as outside above this p_no (default 0.9)."),
]


class ToolArguments(BaseModel):
    """Base of all tool arguments: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PointArgument(ToolArguments):
    """A point in the image."""

    x: float = Field(description="Distance from the left edge.")
    y: float = Field(description="Distance from the top edge.")


class LabelledPointArgument(PointArgument):
    """A point that is known to be on or off the object."""

    label: Literal["inside", "outside", "foreground", "background"] = Field(
        description="'inside' (or 'foreground') = on the object, 'outside' (or 'background') = "
        "not on it."
    )

    @property
    def point_label(self) -> PointLabel:
        """The label as the segmenter takes it."""
        inside = self.label in ("inside", "foreground")
        return PointLabel.FOREGROUND if inside else PointLabel.BACKGROUND


class ToolResult(BaseModel):
    """What every result carries."""

    status: Literal["ok", "found", "not_found"] = "ok"
    text: str = Field(description="The result in words.")
    notes: list[str] = Field(default=[], description="What a reader should know.")


class ImageResult(ToolResult):
    """A result about one image."""

    image_id: str
    image_width: int = Field(description="pixels")
    image_height: int = Field(description="pixels")


class ObjectSummary(BaseModel):
    """What an agent reads about an object."""

    object_id: str
    name: str = Field(description="The expression, or how the object was made.")
    box: list[float] = Field(description="[x_min, y_min, x_max, y_max]")
    score: float | None = Field(
        None, description="Probability that the box is right; null if the model cannot tell."
    )
    area: int | None = Field(None, description="Mask area in pixels; null if no mask is drawn yet.")
    area_fraction: float | None = Field(None, description="Mask area as a share of the image.")
    predicted_iou: float | None = Field(None, description="SAM's own estimate of mask quality.")
    points_inside: int = 0
    points_outside: int = 0
    points_undecided: int = 0


class ObjectsResult(ImageResult):
    """Objects with boxes and, once drawn, masks (masks stay in the workspace)."""

    objects: list[ObjectSummary] = []
    questions: int = Field(0, description="Questions the model was asked.")
