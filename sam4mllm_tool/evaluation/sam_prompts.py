"""Prompts made from the truth, to measure how well a segmenter follows them."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.scenes.render import SceneObject, mask_box
from sam4mllm_tool.types import Box, PointLabel, PromptPoint

JITTER = 0.1  # edges of a jittered box move by up to this share of its sides
WRONG = 0.1  # share of labels that are flipped where labels are wrong
POINT_COUNTS = (1, 3, 5, 10)

Bools = npt.NDArray[np.bool_]


def conditions() -> list[str]:
    """Names of all conditions, in the order of the report."""
    with_points = [f"box_{count}_points" for count in POINT_COUNTS]
    jittered = ["jittered_box", *(f"jittered_{name}" for name in with_points)]
    return [
        "box",
        *with_points,
        "box_10_points_wrong_labels",
        *jittered,
        "one_point",
        "three_points",
    ]


def true_prompts(thing: SceneObject, rng: np.random.Generator) -> dict[str, SegmentPrompt]:
    """The prompts of every condition for one object.

    Points of a box are uniform in it and labelled by the visible mask; a condition with more
    points repeats those of the ones with fewer. Without a box, the first point is the pixel
    deepest inside the object, the others are uniform in its box.
    """
    exact, moved = Box(*thing.box), jittered(Box(*thing.box), thing.mask, rng)
    prompts = {"box": SegmentPrompt(box=exact), "jittered_box": SegmentPrompt(box=moved)}
    for prefix, box in (("", exact), ("jittered_", moved)):
        points = points_in(box, thing.mask, max(POINT_COUNTS), rng)
        for count in POINT_COUNTS:
            prompts[f"{prefix}box_{count}_points"] = SegmentPrompt(box=box, points=points[:count])
        if box is exact:
            flipped = tuple(flip(p) if rng.random() < WRONG else p for p in points)
            prompts["box_10_points_wrong_labels"] = SegmentPrompt(box=box, points=flipped)
    x, y = deepest_pixel(thing.mask)
    first = PromptPoint(x + 0.5, y + 0.5, PointLabel.FOREGROUND)
    prompts["one_point"] = SegmentPrompt(points=(first,))
    prompts["three_points"] = SegmentPrompt(points=(first, *points_in(exact, thing.mask, 2, rng)))
    return {name: prompts[name] for name in conditions()}


def jittered(box: Box, mask: Bools, rng: np.random.Generator) -> Box:
    """The box with every edge moved by up to `JITTER` of its width or height."""
    sides = np.array([box.width, box.height, box.width, box.height])
    moved = np.array(box) + rng.uniform(-JITTER, JITTER, 4) * sides
    height, width = mask.shape
    return Box(*np.clip(moved, 0, [width, height, width, height]).tolist())


def points_in(
    box: Box, mask: Bools, count: int, rng: np.random.Generator
) -> tuple[PromptPoint, ...]:
    """`count` pixel centres, uniform in the box, with true labels."""
    spots = rng.uniform((box.x_min, box.y_min), (box.x_max, box.y_max), (count, 2))
    height, width = mask.shape
    pixels = np.clip(np.floor(spots), 0, (width - 1, height - 1)).astype(int)
    return tuple(labelled(int(x), int(y), mask) for x, y in pixels)


def labelled(x: int, y: int, mask: Bools) -> PromptPoint:
    """The centre of a pixel, labelled by the mask."""
    label = PointLabel.FOREGROUND if mask[y, x] else PointLabel.BACKGROUND
    return PromptPoint(x + 0.5, y + 0.5, label)


def flip(point: PromptPoint) -> PromptPoint:
    """The point with the wrong label."""
    inside = point.label is PointLabel.FOREGROUND
    wrong = PointLabel.BACKGROUND if inside else PointLabel.FOREGROUND
    return PromptPoint(point.x, point.y, wrong)


def error_point(found: Bools, truth: Bools) -> PromptPoint | None:
    """The pixel deepest inside the region where two masks differ, with its true label."""
    wrong = found ^ truth
    return labelled(*deepest_pixel(wrong), truth) if wrong.any() else None


def deepest_pixel(mask: Bools) -> tuple[int, int]:
    """The (x, y) of a pixel farthest from the edge of a mask that is not empty (Chebyshev)."""
    left, top, right, bottom = (int(edge) for edge in mask_box(mask))
    window = np.pad(mask[top:bottom, left:right], 1)
    core = Image.fromarray(window.astype(np.uint8) * 255)
    while True:
        smaller = core.filter(ImageFilter.MinFilter(3))
        if smaller.getbbox() is None:
            break
        core = smaller
    rows, columns = np.nonzero(np.asarray(core)[1:-1, 1:-1])
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return left + int(columns[middle]), top + int(rows[middle])
