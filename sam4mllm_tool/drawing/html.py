"""Self-contained HTML pages, nothing is loaded from anywhere; and the page of a trace."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam4mllm_tool.display import data_uri
from sam4mllm_tool.drawing.overlay import POINT_COLOURS, Colour, colour_of, is_bright, mask_layer
from sam4mllm_tool.types import Mask, RgbImage

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_SIDE = 1600


def render(template: str, **values: Any) -> str:
    """A file of ``templates/`` with the values filled in, which are escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # most calls draw no page

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )


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
            "number": number,
            "name": name,
            "seconds": seconds,
            "share": 100 * seconds / total if total else 0,
            "colour": as_hex(colour_of(number)),
        }
        for number, (name, seconds) in enumerate(data["timings"].items(), 1)
    ]
    return render(
        "trace.html.j2",
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
