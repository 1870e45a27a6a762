"""``sam4mllm-tool probe IMAGE EXPRESSION --point X,Y``: is this point inside the object?"""

from __future__ import annotations

from typing import Annotated, Any

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
from sam4mllm_tool.cli.remote import ServerOption, TokenOption, remote_tools
from sam4mllm_tool.errors import ExpressionError, PromptError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import load_image, read_picture
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.validation import check_expression, check_image_points
from sam4mllm_tool.types import Point, RgbImage


def probe(
    context: typer.Context,
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
    server: ServerOption = None,
    token: TokenOption = None,
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    as_json: JsonOption = False,
) -> None:
    """Ask whether points lie on the object EXPRESSION describes."""
    policy = ImagePolicy(max_pixels=max_pixels, max_bytes=max_bytes)
    data = read_picture(image, policy)
    picture = load_image(data, policy).image
    points = [_point(text) for text in point] if point else None
    check_expression(expression)
    if points:
        check_image_points(points, picture)
    remote = remote_tools(context, server, token)
    if remote is None:
        model = load_models(
            mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype, quiet=as_json
        )
        document = _probed_here(model, picture, expression, points)
    else:
        document = remote.probe(data, expression, points)
    if as_json:
        print_json(document)
        return
    corners = ", ".join(f"{value:.0f}" for value in document["box"])
    console.print(points_table(document["points"], f"box ({corners})"))
    for note in document["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _probed_here(
    model: Sam4MLLM, picture: RgbImage, expression: str, points: list[Point] | None
) -> dict[str, Any]:
    location = model.locate(picture, expression)
    if not location.objects:
        raise ExpressionError(
            f"nothing in the picture matches {expression!r}",
            hint="Describe something that is there.",
        )
    box = location.objects[0].box
    answers = model.check_points(picture, location, box, points)
    return {
        "image_size": list(picture.size),
        "box": list(box),
        "points": [
            {"x": p.x, "y": p.y, "label": p.label.value, "p_yes": p.p_yes, "p_no": p.p_no}
            for p in answers
        ],
        "notes": list(location.notes),
    }


def _point(text: str) -> Point:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise PromptError(f"{text!r} is not a point", hint="Write --point X,Y.") from error
    return Point(x, y)
