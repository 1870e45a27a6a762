"""What scenes are made of: the vocabulary, and how crowded, nested and hidden things are."""

from dataclasses import dataclass, replace

from sam4mllm_tool.scenes.sprites import COLOURS, SHAPES, sprites

BACKGROUNDS = ("plain", "gradient", "clouds", "stripes", "checker", "grain", "clutter")


@dataclass(frozen=True)
class World:
    """The distribution that scenes are drawn from.

    Lengths are shares of the canvas's shorter side; chances lie in 0-1.

    Attributes:
        sprites: ids of sprites (see `sprites.sprites`).
        shapes: names of drawn shapes.
        colours: colour words for shapes and tintable sprites.
        canvas: default (width, height) in pixels; `render_scene` can draw at any other size.
        objects: fewest and most objects of a scene.
        size: smallest and largest longest side of an object.
        shape_chance: that an object is a shape and not a sprite.
        same_name: that an object repeats the name of an earlier one.
        same_colour: that an object repeats the colour of an earlier one.
        overlap: that an object is put partly over an earlier one.
        nesting: that an object is put, small, inside the extent of an earlier one.
        min_visible: the smallest share of an object that later ones leave visible.
        rotation: largest turn, degrees, for the objects that are turned (four in ten).
        hue_shift: that an uncoloured sprite has all its hues turned (for segmenters only).
        blobs: that an object is a nameless textured blob (for segmenters only).
        backgrounds: kinds, out of `BACKGROUNDS`.
    """

    name: str
    sprites: tuple[str, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...] = tuple(COLOURS)
    canvas: tuple[int, int] = (256, 256)
    objects: tuple[int, int] = (1, 4)
    size: tuple[float, float] = (0.2, 0.5)
    shape_chance: float = 0.3
    same_name: float = 0.4
    same_colour: float = 0.2
    overlap: float = 0.2
    nesting: float = 0.0
    min_visible: float = 0.6
    rotation: float = 20.0
    hue_shift: float = 0.0
    blobs: float = 0.0
    backgrounds: tuple[str, ...] = BACKGROUNDS[:6]

    def with_objects(self, fewest: int, most: int) -> "World":
        """The same world with another number of objects per scene."""
        return replace(self, objects=(fewest, most))


def _trained_sprites() -> tuple[str, ...]:
    return tuple(key for key, sprite in sprites().items() if not sprite.held_out)


def _held_out_sprites() -> tuple[str, ...]:
    return tuple(key for key, sprite in sprites().items() if sprite.held_out)


SMALL_WORLD = World(
    name="small",
    sprites=("dog", "apple", "car", "tree", "scissors", "umbrella", "fish", "clock"),
    shapes=("disc", "ring", "star", "cross"),
    objects=(1, 3),
    size=(0.25, 0.55),
    same_name=0.5,
    overlap=0.15,
    min_visible=0.7,
    rotation=12.0,
)

# The same things, mostly several of a kind: for learning ranks and places, not for measuring.
ALIKE_WORLD = replace(SMALL_WORLD, name="small-alike", objects=(2, 3), same_name=0.9)

# The same things in front of each other, up to half of each hidden: a box says less there.
OVERLAP_WORLD = replace(
    SMALL_WORLD, name="small-overlap", objects=(2, 3), overlap=0.9, min_visible=0.5
)
# And mostly of one name and one colour: only the place tells whose part a point is.
LOOK_ALIKE_WORLD = replace(
    SMALL_WORLD, name="small-look-alike", objects=(2, 3), overlap=0.95, min_visible=0.35,
    same_name=0.9, same_colour=0.8,
)  # fmt: skip

FULL_WORLD = World(
    name="full",
    sprites=_trained_sprites(),
    shapes=tuple(name for name, shape in SHAPES.items() if not shape.held_out),
    canvas=(384, 320),
    objects=(2, 6),
    size=(0.18, 0.5),
    overlap=0.3,
    nesting=0.08,
    min_visible=0.5,
)

SAM_WORLD = World(
    name="sam",
    sprites=_trained_sprites(),
    shapes=tuple(name for name, shape in SHAPES.items() if not shape.held_out),
    objects=(2, 5),
    size=(0.16, 0.62),
    shape_chance=0.35,
    same_name=0.35,
    same_colour=0.5,
    overlap=0.5,
    nesting=0.15,
    min_visible=0.5,
    rotation=45.0,
    hue_shift=0.25,
    blobs=0.15,
    backgrounds=BACKGROUNDS,
)

# Smaller things, more of them, up to seven tenths of each hidden: what the small SAM began on.
CROWDED_WORLD = replace(
    SAM_WORLD, name="crowded", objects=(2, 7), size=(0.12, 0.62), min_visible=0.3
)

HELD_OUT_WORLD = replace(
    SAM_WORLD,
    name="held-out",
    sprites=_held_out_sprites(),
    shapes=tuple(name for name, shape in SHAPES.items() if shape.held_out),
    hue_shift=0.0,
    blobs=0.0,
)

WORLDS = {
    world.name: world
    for world in (
        SMALL_WORLD, ALIKE_WORLD, OVERLAP_WORLD, LOOK_ALIKE_WORLD, FULL_WORLD, SAM_WORLD,
        CROWDED_WORLD, HELD_OUT_WORLD,
    )
}  # fmt: skip
