"""Named pictures to compose scenes from: packaged emoji sprites and drawn shapes.

Every picture is RGBA, cropped to what is visible. Colour words apply to drawn shapes and to the
sprites marked tintable, whose saturated pixels take the colour's hue.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sam4mllm_tool.scenes.outline import is_concave, is_thin

ASSETS = Path(__file__).parent / "assets"
SHAPE_SIDE = 128  # pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "yellow": (242, 205, 40),
    "green": (50, 160, 60),
    "blue": (45, 95, 215),
    "purple": (130, 60, 190),
    "pink": (240, 110, 180),
}


@dataclass(frozen=True)
class Sprite:
    """One entry of the catalogue; `id` is unique, several sprites may share a `name`."""

    id: str
    name: str
    plural: str
    tintable: bool
    functions: tuple[str, ...]
    held_out: bool
    cell: tuple[int, int, int, int]
    concave: bool
    thin: bool
    animal: bool = False
    held_out_functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """A drawn shape; always coloured."""

    name: str
    plural: str
    held_out: bool = False


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("disc", "discs"),
        Shape("square", "squares"),
        Shape("triangle", "triangles"),
        Shape("ring", "rings"),
        Shape("crescent", "crescents"),
        Shape("star", "stars"),
        Shape("cross", "crosses"),
        Shape("L shape", "L shapes"),
        Shape("U shape", "U shapes"),
        Shape("bar", "bars"),
        Shape("zigzag", "zigzags"),
        Shape("frame", "frames"),
        Shape("heart", "hearts", held_out=True),
        Shape("arrow", "arrows", held_out=True),
        Shape("T shape", "T shapes", held_out=True),
    )
}


@cache
def sprites() -> dict[str, Sprite]:
    """The whole catalogue by sprite id."""
    entries = json.loads((ASSETS / "sprites.json").read_text(encoding="utf-8"))
    fields = {"functions": tuple, "held_out_functions": tuple, "cell": tuple}
    found = {}
    for entry in entries:
        del entry["character"]
        entry.update({key: convert(entry[key]) for key, convert in fields.items() if key in entry})
        found[entry["id"]] = Sprite(**entry)
    return found


@cache
def plurals() -> dict[str, str]:
    """Plural of every name a scene can hold."""
    named: list[Shape | Sprite] = [*SHAPES.values(), *sprites().values()]
    return {thing.name: thing.plural for thing in named}


@cache
def functions(wording: str = "train") -> dict[str, tuple[str, ...]]:
    """Descriptions of a thing by its function, by name; "held-out" ones are for evaluation only."""
    return {
        sprite.name: sprite.functions if wording == "train" else sprite.held_out_functions
        for sprite in sprites().values()
    }


@cache
def animals() -> frozenset[str]:
    """Names of animals."""
    return frozenset(sprite.name for sprite in sprites().values() if sprite.animal)


@cache
def _sheet() -> Image.Image:
    return Image.open(ASSETS / "sprites.png").convert("RGBA")


@lru_cache(maxsize=2048)
def sprite_picture(sprite_id: str, colour: str | None = None) -> Image.Image:
    """A sprite from the sheet, tinted if a colour is given: RGBA, longest side 112 px."""
    x, y, width, height = sprites()[sprite_id].cell
    picture = _sheet().crop((x, y, x + width, y + height))
    return picture if colour is None else tint(picture, COLOURS[colour])


@lru_cache(maxsize=1024)
def shape_picture(name: str, colour: str, shade: int = 100) -> Image.Image:
    """A drawn shape, softly shaded from top to bottom: RGBA, about `SHAPE_SIDE` px.

    `shade` is its brightness in percent, so that equal shapes can be distinguished where they meet.
    """
    alpha = draw_shape(name)
    light = np.linspace(1.08, 0.86, alpha.height)[:, None, None] * shade / 100
    colours = np.broadcast_to(np.asarray(COLOURS[colour]) * light, (*alpha.size[::-1], 3))
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).convert("RGBA")
    picture.putalpha(alpha)
    return picture


def tint(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Give the saturated pixels of an RGBA picture the hue of `colour`."""
    hue = Image.new("RGB", (1, 1), colour).convert("HSV").getpixel((0, 0))
    assert isinstance(hue, tuple)
    pixels = np.array(picture.convert("RGB").convert("HSV"))
    vivid = pixels[..., 1] > 45
    saturation = np.clip(pixels[..., 1].astype(int), 110, hue[1] + 30)
    pixels[..., 0] = np.where(vivid, hue[0], pixels[..., 0])
    pixels[..., 1] = np.where(vivid, np.minimum(saturation, 255), pixels[..., 1])
    brighten = max(1.0, hue[2] / pixels[..., 2][vivid].mean())  # or yellow turns olive
    value = np.clip(pixels[..., 2] * brighten, 0, 255)
    pixels[..., 2] = np.where(vivid, value, pixels[..., 2])
    tinted = Image.fromarray(pixels, "HSV").convert("RGBA")
    tinted.putalpha(picture.getchannel("A"))
    return tinted


@cache
def draw_shape(name: str) -> Image.Image:
    """The alpha channel of a shape, cropped to its extent (mode L); drawn at 4x and reduced."""
    side = 4 * SHAPE_SIDE
    alpha = Image.new("L", (side, side), 0)
    _DRAWERS[name](ImageDraw.Draw(alpha), side)
    alpha = alpha.reduce(4)
    return alpha.crop(alpha.point(lambda value: 255 if value > 127 else 0).getbbox())


@cache
def shape_is_concave(name: str) -> bool:
    """Whether the shape leaves much of its convex hull empty."""
    return is_concave(np.asarray(draw_shape(name)) > 127)


@cache
def shape_is_thin(name: str) -> bool:
    """Whether the shape is thin compared with its length."""
    return is_thin(np.asarray(draw_shape(name)) > 127)


Draw = ImageDraw.ImageDraw


def _polygon(draw: Draw, side: int, *points: tuple[float, float]) -> None:
    draw.polygon([(x * side, y * side) for x, y in points], fill=255)


def _box(draw: Draw, side: int, *box: float, fill: int = 255) -> None:
    draw.rectangle([edge * side for edge in box], fill=fill)


def _oval(draw: Draw, side: int, *box: float, fill: int = 255) -> None:
    draw.ellipse([edge * side for edge in box], fill=fill)


def _disc(draw: Draw, side: int) -> None:
    _oval(draw, side, 0.02, 0.02, 0.98, 0.98)


def _square(draw: Draw, side: int) -> None:
    _box(draw, side, 0.05, 0.05, 0.95, 0.95)


def _triangle(draw: Draw, side: int) -> None:
    _polygon(draw, side, (0.5, 0.03), (0.98, 0.92), (0.02, 0.92))


def _ring(draw: Draw, side: int) -> None:
    _oval(draw, side, 0.02, 0.02, 0.98, 0.98)
    _oval(draw, side, 0.24, 0.24, 0.76, 0.76, fill=0)


def _crescent(draw: Draw, side: int) -> None:
    _oval(draw, side, 0.02, 0.02, 0.98, 0.98)
    _oval(draw, side, 0.32, -0.02, 1.18, 0.86, fill=0)


def _star(draw: Draw, side: int) -> None:
    points = []
    for corner in range(10):
        radius = 0.49 if corner % 2 == 0 else 0.2
        angle = math.pi * (corner / 5 - 0.5)
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    _polygon(draw, side, *points)


def _cross(draw: Draw, side: int) -> None:
    _box(draw, side, 0.36, 0.03, 0.64, 0.97)
    _box(draw, side, 0.03, 0.36, 0.97, 0.64)


def _l_shape(draw: Draw, side: int) -> None:
    _box(draw, side, 0.1, 0.03, 0.36, 0.97)
    _box(draw, side, 0.1, 0.71, 0.85, 0.97)


def _u_shape(draw: Draw, side: int) -> None:
    _box(draw, side, 0.06, 0.06, 0.94, 0.94)
    _box(draw, side, 0.3, 0, 0.7, 0.7, fill=0)


def _bar(draw: Draw, side: int) -> None:
    _polygon(draw, side, (0.02, 0.12), (0.1, 0.03), (0.98, 0.88), (0.9, 0.97))


def _zigzag(draw: Draw, side: int) -> None:
    top = [(0.02, 0.55), (0.26, 0.2), (0.5, 0.5), (0.74, 0.2), (0.98, 0.55)]
    _polygon(draw, side, *top, *[(x, y + 0.22) for x, y in reversed(top)])


def _frame(draw: Draw, side: int) -> None:
    _box(draw, side, 0.03, 0.12, 0.97, 0.88)
    _box(draw, side, 0.17, 0.26, 0.83, 0.74, fill=0)


def _heart(draw: Draw, side: int) -> None:
    _oval(draw, side, 0.04, 0.08, 0.54, 0.58)
    _oval(draw, side, 0.46, 0.08, 0.96, 0.58)
    _polygon(draw, side, (0.1, 0.48), (0.5, 0.4), (0.9, 0.48), (0.5, 0.96))


def _arrow(draw: Draw, side: int) -> None:
    _box(draw, side, 0.03, 0.4, 0.6, 0.6)
    _polygon(draw, side, (0.55, 0.15), (0.97, 0.5), (0.55, 0.85))


def _t_shape(draw: Draw, side: int) -> None:
    _box(draw, side, 0.05, 0.05, 0.95, 0.3)
    _box(draw, side, 0.37, 0.05, 0.63, 0.95)


_DRAWERS = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "crescent": _crescent,
    "star": _star,
    "cross": _cross,
    "L shape": _l_shape,
    "U shape": _u_shape,
    "bar": _bar,
    "zigzag": _zigzag,
    "frame": _frame,
    "heart": _heart,
    "arrow": _arrow,
    "T shape": _t_shape,
}
