"""Objects of a scene and their positions, in fractions of the canvas: independent of pixels."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from sam4mllm_tool.scenes.background import background
from sam4mllm_tool.scenes.sprites import shape_picture, sprite_picture, sprites
from sam4mllm_tool.scenes.world import World

PLAN_SIDE = 64  # pixels of the shorter side of the canvas on which visibility is planned
TRIES = 12
BLOB = "blob"


@dataclass(frozen=True)
class Placed:
    """One object to draw.

    `x`, `y` are the centre and `side` the longest side before turning, all in shares of the
    canvas's shorter side; `stretch` scales the width; `angle` is in degrees;
    `hue` turns all hues (of 256); `shade` is a shape's brightness in percent.
    """

    key: str
    kind: str
    name: str
    colour: str | None
    side: float
    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    flip: bool = False
    stretch: float = 1.0
    hue: int = 0
    shade: int = 100
    nested: bool = False


def plan_scene(world: World, aspect: float, rng: random.Random) -> list[Placed]:
    """Choose and place the objects of one scene, back to front.

    Every object keeps at least `world.min_visible` of itself visible, judged on a canvas of
    `PLAN_SIDE` pixels whatever the size of the picture will be.
    """
    extent = (max(aspect, 1.0), max(1 / aspect, 1.0))
    canvas = (round(extent[0] * PLAN_SIDE), round(extent[1] * PLAN_SIDE))
    plan: list[Placed] = []
    visible: list[npt.NDArray[np.bool_]] = []
    full_areas: list[int] = []
    for _ in range(rng.randint(*world.objects)):
        thing = _choose(world, plan, rng)
        for _ in range(TRIES):
            placed = _place(world, thing, plan, extent, rng)
            mask = _plan_mask(placed, canvas)
            remaining = [earlier & ~mask for earlier in visible]
            enough = all(
                left.sum() >= world.min_visible * full
                for left, full in zip(remaining, full_areas, strict=True)
            )
            if enough and mask.sum() >= 8 and not _merges(placed, mask, plan, visible):
                plan.append(placed)
                visible = [*remaining, mask]
                full_areas.append(int(mask.sum()))
                break
    return plan


def _merges(
    placed: Placed,
    mask: npt.NDArray[np.bool_],
    plan: list[Placed],
    visible: list[npt.NDArray[np.bool_]],
) -> bool:
    """Whether two equal flat shapes would touch: their border would be invisible."""
    return placed.kind == "shape" and any(
        (earlier.key, earlier.colour) == (placed.key, placed.colour) and (mask & seen).any()
        for earlier, seen in zip(plan, visible, strict=True)
    )


def draw_placed(placed: Placed, canvas: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The object's RGBA picture at its final size, and its top-left corner in pixels."""
    scale = min(canvas)
    picture = _picture(placed)
    factor = placed.side * scale / max(picture.size)
    width = max(3, round(picture.width * factor * placed.stretch))
    picture = picture.resize(
        (width, max(3, round(picture.height * factor))), Image.Resampling.BICUBIC
    )
    if placed.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placed.angle:
        picture = picture.rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)
    left, top = placed.x * scale - picture.width / 2, placed.y * scale - picture.height / 2
    return picture, (round(left), round(top))


def _choose(world: World, plan: list[Placed], rng: random.Random) -> Placed:
    """What the next object is; not yet where."""
    key, kind, name = _choose_key(world, plan, rng)
    coloured = kind == "shape" or (kind == "sprite" and sprites()[key].tintable)
    colour = _choose_colour(world, plan, rng) if coloured else None
    smallest, largest = world.size
    side = smallest * (largest / smallest) ** rng.random()
    angle = rng.uniform(-world.rotation, world.rotation) if rng.random() < 0.4 else 0.0
    shift = kind == "sprite" and not coloured and rng.random() < world.hue_shift
    return Placed(
        key=key,
        kind=kind,
        name=name,
        colour=colour,
        side=side,
        angle=round(angle, 2),
        flip=rng.random() < 0.5,
        stretch=rng.uniform(0.85, 1.15) if world.hue_shift else 1.0,
        hue=rng.randrange(16, 240, 16) if shift else 0,
        shade=rng.randrange(76, 112, 6) if kind == "shape" else 100,
    )


def _choose_key(world: World, plan: list[Placed], rng: random.Random) -> tuple[str, str, str]:
    named = [thing for thing in plan if thing.kind != BLOB]
    if named and rng.random() < world.same_name:
        earlier = rng.choice(named)
        return earlier.key, earlier.kind, earlier.name
    if rng.random() < world.blobs:
        return f"{BLOB}-{rng.getrandbits(12)}", BLOB, BLOB
    if rng.random() < world.shape_chance:
        shape = rng.choice(world.shapes)
        return shape, "shape", shape
    key = rng.choice(world.sprites)
    return key, "sprite", sprites()[key].name


def _choose_colour(world: World, plan: list[Placed], rng: random.Random) -> str:
    used = [thing.colour for thing in plan if thing.colour is not None]
    if used and rng.random() < world.same_colour:
        return rng.choice(used)
    return rng.choice(world.colours)


def _place(
    world: World,
    thing: Placed,
    plan: list[Placed],
    extent: tuple[float, float],
    rng: random.Random,
) -> Placed:
    """Put `thing` somewhere: inside an earlier object, partly over one, or anywhere."""
    chance, margin = rng.random(), thing.side / 2
    if plan and chance < world.nesting:
        host = rng.choice(plan)
        side = host.side * rng.uniform(0.25, 0.5)
        if side >= 0.6 * world.size[0]:
            reach = 0.2 * host.side
            x, y = host.x + rng.uniform(-reach, reach), host.y + rng.uniform(-reach, reach)
            return replace(thing, side=side, x=x, y=y, nested=True)
    if plan and chance < world.nesting + world.overlap:
        host = rng.choice(plan)
        reach = (host.side + thing.side) / 2
        x, y = host.x + rng.uniform(-reach, reach), host.y + rng.uniform(-reach, reach)
    else:
        x, y = rng.uniform(margin, extent[0] - margin), rng.uniform(margin, extent[1] - margin)
    x = min(max(x, margin), extent[0] - margin)
    y = min(max(y, margin), extent[1] - margin)
    return replace(thing, x=x, y=y)


def _plan_mask(placed: Placed, canvas: tuple[int, int]) -> npt.NDArray[np.bool_]:
    picture, corner = draw_placed(placed, canvas)
    alpha = Image.new("L", canvas, 0)
    alpha.paste(picture.getchannel("A"), corner)
    return np.asarray(alpha) > 127


def _picture(placed: Placed) -> Image.Image:
    if placed.kind == BLOB:
        return _blob_picture(placed.key)
    if placed.kind == "shape":
        assert placed.colour is not None
        return shape_picture(placed.key, placed.colour, placed.shade)
    picture = sprite_picture(placed.key, placed.colour)
    return _shift_hue(placed.key, placed.hue) if placed.hue else picture


@lru_cache(maxsize=512)
def _shift_hue(sprite_id: str, hue: int) -> Image.Image:
    picture = sprite_picture(sprite_id)
    pixels = np.array(picture.convert("RGB").convert("HSV"))
    pixels[..., 0] += np.uint8(hue)
    shifted = Image.fromarray(pixels, "HSV").convert("RGBA")
    shifted.putalpha(picture.getchannel("A"))
    return shifted


@lru_cache(maxsize=1024)
def _blob_picture(key: str) -> Image.Image:
    """A smooth random outline (six harmonics of the radius) with a random texture: RGBA."""
    seed = int(key.rpartition("-")[2])
    rng = random.Random(seed)
    side = 96
    y, x = np.mgrid[:side, :side] / (side / 2) - 1
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    edge = np.full_like(angle, 0.62)
    for harmonic in range(1, 7):
        weight = rng.uniform(0, 0.28) / harmonic
        edge += weight * np.cos(harmonic * angle + rng.uniform(0, 6.28))
    alpha = np.clip((edge - radius) * side / 4, 0, 1)
    if rng.random() < 0.3:
        alpha *= np.clip((radius - rng.uniform(0.3, 0.55) * edge) * side / 4, 0, 1)
    kind = rng.choice(["plain", "gradient", "clouds", "stripes", "checker", "clutter"])
    picture = background(kind, (side, side), seed + 1).convert("RGBA")
    dark = rng.uniform(0.3, 1.0)
    picture = picture.point(lambda value: int(value * dark))
    picture.putalpha(Image.fromarray((alpha * 255).astype(np.uint8)))
    return picture.crop(picture.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())
