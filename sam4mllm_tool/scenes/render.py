"""Scenes with exact masks: first a plan in shares of the canvas, then the picture at any size."""

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.scenes.background import background
from sam4mllm_tool.scenes.plan import Placed, draw_placed, plan_scene
from sam4mllm_tool.scenes.sprites import shape_is_concave, shape_is_thin, sprites
from sam4mllm_tool.scenes.world import World

SPLITS = ("train", "val", "test")
OCCLUDED_BELOW = 0.9  # share of the full mask that is visible
SOLID = 127  # alpha above which a pixel belongs to the object

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        name: category, singular.
        colour: colour word, or None where none applies.
        kind: "sprite" or "shape".
        mask: visible pixels, bool H x W.
        full_mask: pixels it would show with nothing in front of it, bool H x W.
        box: (x_min, y_min, x_max, y_max) of the visible mask, pixels, maxima exclusive.
        occluded: less than nine tenths visible.
        nested: put inside the extent of another object.
        concave: leaves much of its convex hull empty (unoccluded outline).
        thin: thickness under 16% of its longest side (unoccluded outline).
    """

    name: str
    colour: str | None
    kind: str
    mask: Mask
    full_mask: Mask
    box: tuple[float, float, float, float]
    occluded: bool
    nested: bool
    concave: bool
    thin: bool

    @property
    def full_area(self) -> int:
        """Pixels of `full_mask`."""
        return int(self.full_mask.sum())

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of `box`, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; later objects lie in front of earlier ones."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    seed: int
    split: str
    index: int
    world: World


def scene_seed(world: World, split: str, index: int, seed: int) -> int:
    """The stream of one scene: a hash, so that no two splits or seeds ever share one."""
    key = f"sam4mllm-tool scene/{world.name}/{split}/{seed}/{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


def render_scene(
    world: World,
    split: str,
    index: int,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
) -> Scene:
    """Scene number `index` of a split.

    Args:
        world: what scenes are drawn from.
        split: "train", "val" or "test".
        index: which scene.
        seed: of the whole set.
        size: (width, height) in pixels, or one side of a square; the world's canvas if None.
            The same scene is drawn at every size of the same aspect ratio.

    Raises:
        InputError: an unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r}", hint=f"use one of {', '.join(SPLITS)}.")
    canvas = world.canvas if size is None else (size, size) if isinstance(size, int) else size
    rng = random.Random(scene_seed(world, split, index, seed))
    plan = plan_scene(world, canvas[0] / canvas[1], rng)
    image = background(rng.choice(world.backgrounds), canvas, rng.getrandbits(48))
    labels = np.full(canvas[::-1], -1, dtype=np.int8)
    full_masks = []
    for number, placed in enumerate(plan):
        full_masks.append(composite(image, labels, placed, number))
    objects = (
        _scene_object(placed, labels == number, full_mask)
        for number, (placed, full_mask) in enumerate(zip(plan, full_masks, strict=True))
    )
    seen = tuple(thing for thing in objects if thing is not None)
    return Scene(image, seen, seed, split, index, world)


def composite(
    image: Image.Image, labels: npt.NDArray[np.int8], placed: Placed, number: int
) -> Mask:
    """Paste an object in place, write its number into the label map, return its full mask."""
    picture, (x, y) = draw_placed(placed, image.size)
    image.paste(picture, (x, y), picture)
    full = np.zeros(labels.shape, dtype=np.bool_)
    solid = np.asarray(picture.getchannel("A")) > SOLID
    top, left = max(y, 0), max(x, 0)
    window = solid[top - y : labels.shape[0] - y, left - x : labels.shape[1] - x]
    full[top : top + window.shape[0], left : left + window.shape[1]] = window
    labels[full] = number
    return full


def mask_box(mask: Mask) -> tuple[float, float, float, float]:
    """(x_min, y_min, x_max, y_max) of a bool H x W mask that is not empty, maxima exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _scene_object(placed: Placed, mask: Mask, full_mask: Mask) -> SceneObject | None:
    area, full_area = int(mask.sum()), int(full_mask.sum())
    if area == 0:
        return None
    sprite = sprites().get(placed.key)
    if sprite is not None:
        concave, thin = sprite.concave, sprite.thin
    elif placed.kind == "shape":
        concave, thin = shape_is_concave(placed.key), shape_is_thin(placed.key)
    else:
        concave = thin = False
    return SceneObject(
        name=placed.name,
        colour=placed.colour,
        kind="sprite" if sprite is not None else "shape",
        mask=mask,
        full_mask=full_mask,
        box=mask_box(mask),
        occluded=area < OCCLUDED_BELOW * full_area,
        nested=placed.nested,
        concave=concave,
        thin=thin,
    )
