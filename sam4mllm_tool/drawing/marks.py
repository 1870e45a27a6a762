"""Numbered marks on the picture, for models that read marks better than coordinates.

One marked picture serves all points of a question round: it is encoded once, and each question
names a mark ("Is the dot of mark 3 on …?"). The idea is Set-of-Mark prompting (arXiv 2310.11441).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sam4mllm_tool.types import Box, Point, RgbImage

DOT = (255, 0, 0)
RING = (255, 255, 255)
FRAME = (0, 255, 255)
LABEL_TEXT = (255, 255, 255)
LABEL_GROUND = (0, 0, 0)

Rectangle = tuple[int, int, int, int]


def dot_radius(size: tuple[int, int]) -> float:
    """Radius of a mark's dot in pixels for an image of ``size``: large enough to be visible after
    a model's resizing, small enough to leave the object visible.
    """
    return max(1.5, min(size) / 160)


def draw_marks(image: RgbImage, points: Sequence[Point], box: Box | None = None) -> RgbImage:
    """A copy of the image with marks 1…n on the points and a thin frame around the box.

    A dot covers the pixels whose centres lie within :func:`dot_radius` of its point, with a white
    ring around it; its number is placed beside it where it covers least. Dots are drawn last, so
    that no number hides one.

    Args:
        image: the picture; it is not changed.
        points: pixels of the image; mark ``i`` (from 1) is drawn on ``points[i - 1]``.
        box: pixels of the image, or ``None`` for no frame.
    """
    pixels = image.array.copy()
    radius = dot_radius(image.size)
    if box is not None:
        _draw_frame(pixels, box, max(1, round(radius / 3)))
    canvas = Image.fromarray(pixels)
    _draw_numbers(canvas, points, radius)
    pixels = np.array(canvas)
    for point in points:
        _draw_dot(pixels, point, radius)
    return RgbImage.from_pil(Image.fromarray(pixels))


def _draw_dot(pixels: NDArray[np.uint8], point: Point, radius: float) -> None:
    reach = radius + max(1.0, radius / 3)
    x0, y0 = max(0, math.floor(point.x - reach)), max(0, math.floor(point.y - reach))
    window = pixels[y0 : math.ceil(point.y + reach), x0 : math.ceil(point.x + reach)]
    rows, columns = np.mgrid[: window.shape[0], : window.shape[1]]
    distance = np.hypot(x0 + columns + 0.5 - point.x, y0 + rows + 0.5 - point.y)
    window[distance <= reach] = RING
    window[distance <= radius] = DOT


def _draw_frame(pixels: NDArray[np.uint8], box: Box, thickness: int) -> None:
    """A frame just outside the box, so that it covers no part of the object."""
    x0, y0 = math.floor(box.x_min), math.floor(box.y_min)
    x1, y1 = math.ceil(box.x_max), math.ceil(box.y_max)
    outer = [slice(max(0, a - thickness), b + thickness) for a, b in ((y0, y1), (x0, x1))]
    inside = pixels[max(0, y0) : y1, max(0, x0) : x1].copy()
    pixels[outer[0], outer[1]] = FRAME
    pixels[max(0, y0) : y1, max(0, x0) : x1] = inside


def _draw_numbers(canvas: Image.Image, points: Sequence[Point], radius: float) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(9.0, radius * 3.5))
    reach = radius + max(1.0, radius / 3)
    taken = [_around(point, reach) for point in points]
    for number, point in enumerate(points, start=1):
        left, top, right, bottom = draw.textbbox((0, 0), str(number), font=font)
        width, height = math.ceil(right - left) + 2, math.ceil(bottom - top) + 2
        spot = _best_spot(point, reach, (width, height), canvas.size, taken)
        taken.append(spot)
        draw.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=LABEL_GROUND)
        draw.text((spot[0] + 1 - left, spot[1] + 1 - top), str(number), LABEL_TEXT, font=font)


def _best_spot(
    point: Point,
    reach: float,
    label: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Of eight positions around the dot, the one inside the image that covers least."""
    width, height = label
    spots = []
    for across, down in ((1, -1), (1, 1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1)):
        x = point.x + across * (reach + width / 2) - width / 2
        y = point.y + down * (reach + height / 2) - height / 2
        left = min(max(0, round(x)), max(0, size[0] - width))
        top = min(max(0, round(y)), max(0, size[1] - height))
        spots.append((left, top, left + width, top + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def _around(point: Point, reach: float) -> Rectangle:
    return (
        math.floor(point.x - reach),
        math.floor(point.y - reach),
        math.ceil(point.x + reach),
        math.ceil(point.y + reach),
    )


def _overlap(a: Rectangle, b: Rectangle) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)
