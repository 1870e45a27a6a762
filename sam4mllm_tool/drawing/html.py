"""A trace as one self-contained HTML page: nothing is loaded from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sam4mllm_tool.display import data_uri
from sam4mllm_tool.drawing.overlay import POINT_COLOURS, Colour, colour_of, is_bright, mask_layer
from sam4mllm_tool.types import Mask, RgbImage

MAX_SIDE = 1600
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
)
"""Templates of the pages; inserted values are escaped."""


def trace_page(data: dict[str, Any], image: RgbImage) -> str:
    """The HTML page of a run.

    Args:
        data: ``Trace.page_data()``.
        image: the picture of the run; shown at no more than ``MAX_SIDE`` pixels.
    """
    objects = [
        {
            **one,
            "number": number,
            "colour": as_hex(colour_of(number)),
            "ink": "#000" if is_bright(colour_of(number)) else "#fff",
            "layer": data_uri(
                mask_layer(Mask.from_rle(one["mask"]), colour_of(number)), "PNG", MAX_SIDE
            ),
        }
        for number, one in enumerate(data["objects"], 1)
    ]
    total = sum(data["timings"].values())
    stages = [
        {
            "name": name,
            "seconds": seconds,
            "share": 100 * seconds / total if total else 0,
            "colour": as_hex(colour_of(number)),
        }
        for number, (name, seconds) in enumerate(data["timings"].items(), 1)
    ]
    return ENVIRONMENT.get_template("trace.html.j2").render(
        trace=data,
        objects=objects,
        stages=stages,
        total=total,
        picture=data_uri(image.pil, "JPEG", MAX_SIDE),
        unit=max(image.size) / 100,
        point_colours={label: as_hex(colour) for label, colour in POINT_COLOURS.items()},
    )


def as_hex(colour: Colour) -> str:
    """The colour in CSS notation."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
