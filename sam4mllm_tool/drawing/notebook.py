"""Results as notebook output: bounded in size, self-contained.

Styles are inline and colours come from the notebook's theme: an untrusted notebook drops style
sheets, and its background may be light or dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sam4mllm_tool.display import MAX_SIDE, data_uri
from sam4mllm_tool.drawing.html import as_hex, render
from sam4mllm_tool.drawing.overlay import colour_of, small_overlay
from sam4mllm_tool.types import RgbImage

BLANK = (128, 128, 128)


def result_html(
    title: str,
    status: str,
    picture: Image.Image,
    objects: Sequence[Mapping[str, Any]],
    *,
    dialogue: Sequence[Mapping[str, str]] = (),
    numbers: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The HTML of a result.

    Args:
        title: usually the expression.
        status: in words.
        picture: shown at no more than ``MAX_SIDE`` pixels.
        objects: as in a trace; ``area`` and ``predicted_iou`` may be missing. Pixels of the image.
        dialogue: turns as ``{"role", "text"}``, collapsed.
        numbers: unit of the coordinates in the dialogue.
        notes: remarks for the reader, one sentence each.
    """
    rows = [
        {**one, "colour": as_hex(colour_of(number)), "points": _counts(one.get("points", ()))}
        for number, one in enumerate(objects, 1)
    ]
    return render(
        "notebook.html.j2",
        title=title,
        status=status,
        picture=data_uri(picture, "JPEG"),
        width=min(picture.width, MAX_SIDE),
        objects=rows,
        dialogue=dialogue,
        numbers=numbers,
        notes=notes,
    )


def small_picture(
    image: RgbImage | None, size: tuple[int, int], objects: Sequence[Mapping[str, Any]]
) -> Image.Image:
    """The overlay at no more than ``MAX_SIDE`` pixels.

    Args:
        image: the picture; without it, masks, boxes and points are drawn on plain grey.
        size: (width, height) of the image in pixels.
        objects: as in a trace.
    """
    ground = image.pil if image is not None else None
    return small_overlay(ground, size, objects, MAX_SIDE, BLANK)


def _counts(points: Sequence[Mapping[str, Any]]) -> str:
    """How many points got each label, empty if none was asked."""
    labels = [point["label"] for point in points]
    words = {"foreground": "on it", "background": "off it", "undecided": "undecided"}
    return ", ".join(f"{labels.count(k)} {word}" for k, word in words.items() if k in labels)
