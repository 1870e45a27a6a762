"""A trace as one self-contained HTML page: nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from sam4mllm_tool.drawing.overlay import POINT_COLOURS, Colour, colour_of, is_bright, mask_layer
from sam4mllm_tool.types import Mask, RgbImage

_TEMPLATES = Path(__file__).parent / "templates"
MAX_SIDE = 1600


def trace_page(data: dict[str, Any], image: RgbImage) -> str:
    """The page of a run.

    Args:
        data: ``Trace.page_data()``.
        image: the picture that was asked about; shown at no more than ``MAX_SIDE`` pixels.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    objects = [
        {
            **one,
            "number": number,
            "colour": _hex(colour_of(number)),
            "ink": "#000" if is_bright(colour_of(number)) else "#fff",
            "layer": _data_uri(mask_layer(Mask.from_rle(one["mask"]), colour_of(number)), "PNG"),
        }
        for number, one in enumerate(data["objects"], 1)
    ]
    total = sum(data["timings"].values())
    stages = [
        {
            "name": name,
            "seconds": seconds,
            "share": 100 * seconds / total if total else 0,
            "colour": _hex(colour_of(number)),
        }
        for number, (name, seconds) in enumerate(data["timings"].items(), 1)
    ]
    return environment.get_template("trace.html.j2").render(
        trace=data,
        objects=objects,
        stages=stages,
        total=total,
        picture=_data_uri(image.pil, "JPEG"),
        unit=max(image.size) / 100,
        point_colours={label: _hex(colour) for label, colour in POINT_COLOURS.items()},
    )


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _data_uri(picture: Image.Image, form: str) -> str:
    small = picture.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format=form, **({"quality": 92} if form == "JPEG" else {}))
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{encoded}"
