"""Batches for training a small SAM: augmented scenes, prompts, masks at the logits' resolution.

Coordinates are pixels of the square input image, boxes (x_min, y_min, x_max, y_max).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from recipes.embedded_sam.scene_cache import open_scene_cache

MIN_PIXELS = 60  # smaller visible masks teach nothing at this resolution
POINTS_WITH_BOX = (0, 0, 1, 3, 5, 8, 10, 10)
POINTS_WITHOUT_BOX = (1, 1, 1, 2, 3)

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]


@dataclass
class DenseBatch:
    """Pictures with every object: `images` uint8 B x 3 x S x S; for each picture `masks[b]`
    K x G x G in 0-1 (share of the cell that is covered) and `seeds[b]` K x 2, a pixel of each.
    """

    images: torch.Tensor
    masks: list[torch.Tensor]
    seeds: list[torch.Tensor]


@dataclass
class PromptGroup:
    """Prompts with equal numbers of points; prompt i belongs to picture `picture[i]`.

    `boxes` N x 4 or None, `points` N x K x 2, `labels` N x K (1 foreground, 0 background),
    `targets` N x G x G uint8 (255: the cell is covered).
    """

    picture: torch.Tensor
    boxes: torch.Tensor | None
    points: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor


@dataclass
class PromptBatch(DenseBatch):
    """The same with groups of prompts about the pictures."""

    groups: list[PromptGroup]


@dataclass(frozen=True)
class BatchSettings:
    """What a loader draws.

    Attributes:
        cells: side G of the mask logits.
        pictures: pictures per batch.
        boxes: prompts with a box per picture.
        no_boxes: prompts without a box per picture, on average.
        dense: whole pictures for dense pre-training, and no prompts.
    """

    cells: int
    pictures: int
    boxes: int = 4
    no_boxes: float = 1.5
    dense: bool = False


class SceneBatches(IterableDataset[DenseBatch | PromptBatch]):
    """An endless stream of batches from a scene cache, the same for the same seed."""

    def __init__(self, cache: Path, settings: BatchSettings, seed: int) -> None:
        self.cache, self.settings, self.seed = cache, settings, seed

    def __iter__(self) -> Iterator[DenseBatch | PromptBatch]:
        scenes = open_scene_cache(self.cache)
        rng = np.random.default_rng(self.seed)
        draw = draw_dense if self.settings.dense else draw_prompts
        while True:
            pictures: list[tuple[npt.NDArray[np.uint8], list[Bools]]] = []
            while len(pictures) < self.settings.pictures:
                number = int(rng.integers(len(scenes)))
                image, labels = augment(scenes.images[number], scenes.labels[number], rng)
                masks = visible_masks(labels)
                if masks:
                    pictures.append((image, masks))
            yield draw(pictures, self.settings, rng)


def scene_batches(cache: Path, settings: BatchSettings, seed: int) -> Iterator[object]:
    """Batches drawn by one process of their own."""
    dataset = SceneBatches(cache, settings, seed)
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=6))


def augment(
    image: npt.NDArray[np.uint8], labels: Labels, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Turn by quarters, mirror, swap colour channels, change brightness: the masks stay exact.

    Half of the pictures are softened, as those are that are enlarged to the model's input.
    """
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if mirror:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    if rng.random() < 0.4:
        table = np.clip(np.arange(256) * rng.uniform(0.6, 1.2) + rng.uniform(-25, 25), 0, 255)
        image = table.astype(np.uint8)[image]
    if rng.random() < 0.5:
        image = _softened(image, rng.uniform(0.6, 1.0))
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)


def _softened(image: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """The picture reduced to `scale` of its sides and enlarged again."""
    height, width = image.shape[:2]
    small = Image.fromarray(np.ascontiguousarray(image)).resize(
        (round(scale * width), round(scale * height)), Image.Resampling.BILINEAR
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def visible_masks(labels: Labels) -> list[Bools]:
    """Masks, bool S x S, of the objects that show enough of themselves."""
    counts = np.bincount(labels.ravel().astype(np.int64) + 1, minlength=2)[1:]
    return [labels == number for number, count in enumerate(counts) if count >= MIN_PIXELS]


def covered(mask: Bools, cells: int) -> npt.NDArray[np.uint8]:
    """Share of each cell that a mask covers, 0-255, `cells` x `cells`."""
    side = mask.shape[0] // cells
    share = mask.reshape(cells, side, cells, side).sum(axis=(1, 3), dtype=np.uint16)
    return (share * 255 // (side * side)).astype(np.uint8)


def draw_dense(
    pictures: list[tuple[npt.NDArray[np.uint8], list[Bools]]],
    settings: BatchSettings,
    rng: np.random.Generator,
) -> DenseBatch:
    """Every object of every picture, with one random pixel on it."""
    return DenseBatch(
        _stack([image for image, _ in pictures]),
        [
            torch.from_numpy(np.stack([covered(mask, settings.cells) for mask in masks])) / 255
            for _, masks in pictures
        ],
        [torch.from_numpy(np.stack([pixel_on(m, rng) for m in masks])) for _, masks in pictures],
    )


def draw_prompts(
    pictures: list[tuple[npt.NDArray[np.uint8], list[Bools]]],
    settings: BatchSettings,
    rng: np.random.Generator,
) -> PromptBatch:
    """One group of prompts with boxes and one without, with random numbers of points."""
    spare = settings.no_boxes - int(settings.no_boxes)
    no_boxes = int(settings.no_boxes) + int(rng.random() < spare)
    groups = []
    for number, with_box in ((settings.boxes, True), (no_boxes, False)):
        if number:
            groups.append(_draw_group(pictures, settings.cells, number, with_box, rng))
    return PromptBatch(**vars(draw_dense(pictures, settings, rng)), groups=groups)


def _draw_group(
    pictures: list[tuple[npt.NDArray[np.uint8], list[Bools]]],
    cells: int,
    number: int,
    with_box: bool,
    rng: np.random.Generator,
) -> PromptGroup:
    count = int(rng.choice(POINTS_WITH_BOX if with_box else POINTS_WITHOUT_BOX))
    owners, boxes, points, labels, targets = [], [], [], [], []
    for owner, (_, masks) in enumerate(pictures):
        order = [int(place) for place in rng.permutation(len(masks))]
        for turn in range(number):
            target = masks[order[turn % len(order)]]
            box = mask_box(target)
            if with_box and count and len(masks) > 1 and rng.random() < 0.2:
                box = _union(box, mask_box(masks[int(rng.integers(len(masks)))]))
            given = jitter_box(box, float(rng.choice([0.0, 0.05, 0.1, 0.15, 0.25])), target, rng)
            where = points_in(given if with_box else box, target, count, not with_box, rng)
            owners.append(owner)
            boxes.append(given)
            points.append(where)
            labels.append(
                _labels(where, target, 0.1 if with_box and rng.random() < 0.2 else 0, rng)
            )
            targets.append(covered(target, cells))
    return PromptGroup(
        torch.tensor(owners),
        torch.from_numpy(np.stack(boxes)) if with_box else None,
        torch.from_numpy(np.stack(points)),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(targets)),
    )


def mask_box(mask: Bools) -> Floats:
    """(x_min, y_min, x_max, y_max) of a mask, maxima exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def jitter_box(box: Floats, most: float, mask: Bools, rng: np.random.Generator) -> Floats:
    """Move every edge by up to `most` of the box's width or height, inside the picture."""
    width, height = box[2] - box[0], box[3] - box[1]
    moved = box + rng.uniform(-most, most, 4) * np.array([width, height, width, height])
    return np.clip(moved, 0, mask.shape[0]).astype(np.float32)


def pixel_on(mask: Bools, rng: np.random.Generator) -> Floats:
    """The (x, y) of a random pixel of a mask."""
    rows, columns = np.nonzero(mask)
    place = int(rng.integers(len(rows)))
    return np.array([columns[place], rows[place]], dtype=np.float32)


def points_in(
    box: Floats, mask: Bools, count: int, first_inside: bool, rng: np.random.Generator
) -> Floats:
    """`count` points, (count, 2): uniform in the box, every third on the mask."""
    side = mask.shape[0]
    places = rng.uniform(box[:2], np.maximum(box[2:], box[:2] + 1), (count, 2))
    points: Floats = np.clip(np.floor(places), 0, side - 1).astype(np.float32)
    for place in range(count):
        if (place == 0 and first_inside) or rng.random() < 0.2:
            points[place] = pixel_on(mask, rng)
    return points


def _labels(
    points: Floats, mask: Bools, wrong: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    columns, rows = points.astype(np.int64).T if len(points) else (np.zeros(0, int),) * 2
    true = mask[rows, columns]
    return np.asarray(true ^ (rng.random(len(points)) < wrong), dtype=np.int64)


def _union(one: Floats, other: Floats) -> Floats:
    low, high = np.minimum(one[:2], other[:2]), np.maximum(one[2:], other[2:])
    return np.concatenate([low, high]).astype(np.float32)


def _stack(images: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
