"""``sam4mllm-tool probe IMAGE EXPRESSION --point X,Y``: is this point inside the object?"""

from __future__ import annotations

from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
    load_models,
    points_table,
    print_json,
)
from sam4mllm_tool.errors import ExpressionError, PromptError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.validation import check_expression, check_image_points
from sam4mllm_tool.types import Point


def probe(
    image: Annotated[str, typer.Argument(help="Path or data URI.")],
    expression: Annotated[str, typer.Argument(help="The object.")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="X,Y in pixels; again for more; none for an even grid."),
    ] = None,
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    device: DeviceOption = "auto",
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    as_json: JsonOption = False,
) -> None:
    """Ask whether points lie on the object EXPRESSION describes."""
    from sam4mllm_tool.images.loading import load_image

    picture = load_image(image, ImagePolicy(max_pixels=max_pixels, max_bytes=max_bytes)).image
    points = [_point(text) for text in point] if point else None
    check_expression(expression)
    if points:
        check_image_points(points, picture)
    model = load_models(
        mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype, quiet=as_json
    )
    location = model.locate(picture, expression)
    if not location.objects:
        raise ExpressionError(
            f"nothing in the picture matches {expression!r}",
            hint="Describe something that is there.",
        )
    box = location.objects[0].box
    answers = model.check_points(picture, location, box, points)
    if as_json:
        print_json(
            {
                "image_size": list(picture.size),
                "box": list(box),
                "points": [
                    {"x": p.x, "y": p.y, "label": p.label.value, "p_yes": p.p_yes, "p_no": p.p_no}
                    for p in answers
                ],
                "notes": list(location.notes),
            }
        )
        return
    corners = ", ".join(f"{value:.0f}" for value in box)
    console.print(points_table(answers, f"box ({corners})"))
    for note in location.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _point(text: str) -> Point:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise PromptError(f"{text!r} is not a point", hint="Write --point X,Y.") from error
    return Point(x, y)
