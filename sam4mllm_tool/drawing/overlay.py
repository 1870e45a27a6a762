"""Pictures of results: overlays for people, numbered views for multimodal readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sam4mllm_tool.types import Box, Mask, RgbImage

Colour = tuple[int, int, int]

# Okabe and Ito's palette, distinguishable with any kind of colour vision.
PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
POINT_COLOURS: dict[str, Colour] = {
    "foreground": (34, 170, 80),
    "background": (215, 40, 40),
    "undecided": (128, 128, 128),
}
OPACITY = 0.5
_LABEL_GRID = 1024
CROP_SIDE = 448
"""A smaller crop is enlarged to this longer side in pixels, within the bound."""


def colour_of(number: int) -> Colour:
    """The colour of object ``number`` (1, 2, …)."""
    return PALETTE[(number - 1) % len(PALETTE)]


def is_bright(colour: Colour) -> bool:
    """Whether text on this colour should be black."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def overlay_masks(image: RgbImage, masks: Mapping[int, Mask]) -> Image.Image:
    """The picture with each mask tinted, outlined and numbered; same size as the image."""
    pixels = image.array.copy()
    for number, mask in masks.items():
        window, inside = _tight(mask)
        _tint(pixels[window], inside, colour_of(number))
    for number, mask in masks.items():
        window, inside = _tight(mask)
        pixels[window][_rim(inside, mask.pixels.shape)] = colour_of(number)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for number, mask in masks.items():
        if mask.area:
            _label(draw, str(number), _inmost(mask), colour_of(number), picture.size)
    return picture


def overlay(image: RgbImage, objects: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The picture with masks (where there are any), boxes and points of a trace's ``objects``.

    Foreground points are green discs, background points red crosses, undecided ones grey squares;
    their size follows the answer's probability.
    """
    masks = {n: Mask.from_rle(one["mask"]) for n, one in enumerate(objects, 1) if "mask" in one}
    picture = overlay_masks(image, masks)
    draw = ImageDraw.Draw(picture)
    width = max(1, round(max(image.size) / 300))
    for number, one in enumerate(objects, 1):
        x0, y0, x1, y1 = one["box"]
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=colour_of(number), width=width)
        for point in one["points"]:
            _point(draw, point, unit=max(image.size) / 160)
    return picture


def small_overlay(
    image: Image.Image | None,
    size: tuple[int, int],
    objects: Sequence[Mapping[str, Any]],
    max_side: int,
    blank: Colour = (128, 128, 128),
) -> Image.Image:
    """:func:`overlay` at no more than ``max_side`` pixels, drawn at that size.

    Args:
        image: the picture, at any size; ``None`` = draw on ``blank``.
        size: (width, height) of the image that the objects' coordinates refer to.
        objects: as in a trace; without a ``mask`` only box and points are drawn.
        max_side: bound on both sides of the result.
        blank: background colour if there is no picture.
    """
    scale = min(1.0, max_side / max(size))
    small = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    ground = image.resize(small) if image is not None else Image.new("RGB", small, blank)
    return overlay(RgbImage.from_pil(ground), [_scaled(one, small, size) for one in objects])


def _scaled(
    one: Mapping[str, Any], small: tuple[int, int], size: tuple[int, int]
) -> Mapping[str, Any]:
    """An object's coordinates and mask scaled to a picture of another size."""
    x, y = small[0] / size[0], small[1] / size[1]
    points = [{**point, "x": point["x"] * x, "y": point["y"] * y} for point in one["points"]]
    box = [number * (x, y)[place % 2] for place, number in enumerate(one["box"])]
    mask = {"mask": Mask.from_rle(one["mask"]).resized(small).to_rle()} if "mask" in one else {}
    return {**one, "points": points, "box": box, **mask}


def numbered_view(
    image: RgbImage, masks: Mapping[int, Mask], *, crop: bool = False, max_side: int = 768
) -> Image.Image:
    """The picture with numbered masks, whole or cropped to them, its sides at most ``max_side``.

    A small crop is enlarged, so that details and numbers can be read.
    """
    whole = (0, 0, image.width, image.height)
    window = _around(image, list(masks.values())) if crop else whole
    picture = image.pil.crop(window)
    wanted = max(picture.size) if window == whole else max(CROP_SIDE, *picture.size)
    scale = min(wanted, max_side) / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = RgbImage.from_pil(picture.resize(size, Image.Resampling.LANCZOS))
    shrunk = {
        number: Mask(np.asarray(mask.to_pil().crop(window).resize(size)) > 127)
        for number, mask in masks.items()
    }
    return overlay_masks(small, shrunk)


def mask_layer(mask: Mask, colour: Colour) -> Image.Image:
    """The mask as a transparent RGBA picture in one colour, its rim opaque."""
    layer = np.zeros((mask.height, mask.width, 4), np.uint8)
    layer[mask.pixels] = (*colour, round(255 * OPACITY))
    layer[_rim(mask.pixels, mask.pixels.shape)] = (*colour, 255)
    return Image.fromarray(layer)


def _tint(pixels: NDArray[np.uint8], inside: NDArray[np.bool_], colour: Colour) -> None:
    """Mix a colour into the pixels, by a table per channel: floats of a photograph take 12 times
    its memory.
    """
    values = np.arange(256, dtype=np.float32)
    for channel, value in enumerate(colour):
        mixed = np.round((1 - OPACITY) * values + OPACITY * value).astype(np.uint8)
        plane = pixels[..., channel]
        plane[inside] = mixed[plane[inside]]


def _tight(mask: Mask) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The mask's own window of the picture, and the mask in it."""
    x0, y0, x1, y1 = map(int, mask.box or (0, 0, 0, 0))
    window = slice(y0, y1), slice(x0, x1)
    return window, mask.pixels[window]


def _rim(inside: NDArray[np.bool_], picture: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask's outermost pixels; two rows of them on large pictures."""
    from scipy.ndimage import binary_dilation, binary_erosion  # slow to import

    rim = inside & ~binary_erosion(inside)
    return binary_dilation(rim) & inside if max(picture) > 600 else rim


def _inmost(mask: Mask) -> tuple[float, float]:
    """The (x, y) of the mask farthest from its edge: a label there lies on the object."""
    (rows, columns), inside = _tight(mask)
    from scipy.ndimage import distance_transform_edt

    # Distances take some 16 bytes per pixel: those of large masks are measured on a grid.
    step = max(1, max(inside.shape) // _LABEL_GRID)
    coarse = inside[::step, ::step]
    if not coarse.any():  # too thin for the grid
        step, coarse = 1, inside
    depth = distance_transform_edt(np.pad(coarse, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return columns.start + step * float(column) + 0.5, rows.start + step * float(row) + 0.5


def _around(image: RgbImage, masks: Sequence[Mask]) -> tuple[int, int, int, int]:
    """The window around all masks with a tenth of margin; the whole picture if there are none."""
    boxes = [mask.box for mask in masks if mask.box]
    if not boxes:
        return 0, 0, image.width, image.height
    x0, y0 = min(b.x_min for b in boxes), min(b.y_min for b in boxes)
    x1, y1 = max(b.x_max for b in boxes), max(b.y_max for b in boxes)
    margin = 0.1 * max(x1 - x0, y1 - y0) + 2
    window = Box(x0 - margin, y0 - margin, x1 + margin, y1 + margin)
    return (
        max(0, int(window.x_min)),
        max(0, int(window.y_min)),
        min(image.width, int(window.x_max) + 1),
        min(image.height, int(window.y_max) + 1),
    )


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    centre: tuple[float, float],
    colour: Colour,
    size: tuple[int, int],
) -> None:
    """A number on a filled rectangle, kept inside the picture."""
    font = ImageFont.load_default(size=max(12, round(max(size) / 32)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="lt")
    half_x, half_y = (right - left) / 2 + 3, (bottom - top) / 2 + 3
    x = min(max(centre[0], half_x), max(half_x, size[0] - half_x - 1))
    y = min(max(centre[1], half_y), max(half_y, size[1] - half_y - 1))
    plate = (x - half_x, y - half_y, x + half_x, y + half_y)
    draw.rounded_rectangle(plate, radius=3, fill=colour, outline=(255, 255, 255))
    ink = (0, 0, 0) if is_bright(colour) else (255, 255, 255)
    draw.text((x, y), text, font=font, anchor="mm", fill=ink)


def _point(draw: ImageDraw.ImageDraw, point: Mapping[str, Any], unit: float) -> None:
    """One answered point; its shape shows the answer, its size the probability."""
    x, y, label = point["x"], point["y"], point["label"]
    sure = max(point.get("p_yes") or 0.0, point.get("p_no") or 0.0) or 1.0
    r = max(2.0, unit * (0.8 + 1.4 * sure) * (0.7 if label == "undecided" else 1.0))
    fill, white = POINT_COLOURS[label], (255, 255, 255)
    if label == "foreground":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=white)
    elif label == "background":
        for colour, width in ((white, r), (fill, max(1.0, r / 2))):
            draw.line((x - r, y - r, x + r, y + r), fill=colour, width=round(width))
            draw.line((x - r, y + r, x + r, y - r), fill=colour, width=round(width))
    else:
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill, outline=white)
