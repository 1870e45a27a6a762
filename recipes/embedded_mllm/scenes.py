"""Scenes as base training reads them: small pictures, object maps, objects and expressions.

Base training reads tens of thousands of pictures, and rendering them takes longer than training on
them. So shards on disk hold the pictures at the model's size and, per picture, a small map of
object numbers and a line of JSON with its objects and expressions. There are no pickles.
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam4mllm_tool.disk import write_whole
from sam4mllm_tool.scenes.expressions import expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import WORLDS, World

LABEL_SIDE = 128
"""Side of the stored object maps; 0 is background, ``n + 1`` is object ``n``."""
SHARD = 1000


@dataclass(frozen=True)
class Thing:
    """An object: name, colour, box (fractions of the sides), and area without occlusion."""

    name: str
    colour: str | None
    box: tuple[float, float, float, float]
    full_area: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, in fractions of the sides."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Reference:
    """An expression, its kind, and the numbers of the objects it names (none: absent)."""

    text: str
    kind: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class BaseScene:
    """One picture (H x W x 3 uint8), its object map (uint8), objects and expressions."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    references: tuple[Reference, ...]

    def object_at(self, x: float, y: float) -> int:
        """Number of the object at a point (fractions of the sides); -1 for background."""
        side = LABEL_SIDE
        column, row = min(int(x * side), side - 1), min(int(y * side), side - 1)
        return int(self.labels[max(row, 0), max(column, 0)]) - 1


class SceneShards:
    """All shards of a split in a folder, pictures and maps behind memory maps."""

    def __init__(self, folder: Path, split: str) -> None:
        self._shards = []
        for path in sorted(folder.glob(f"{split}-*.json")):
            stem = path.with_suffix("")
            self._shards.append(
                (
                    np.load(f"{stem}-images.npy", mmap_mode="r"),
                    np.load(f"{stem}-labels.npy", mmap_mode="r"),
                    path.read_text(encoding="utf-8").splitlines(),
                )
            )

    def __len__(self) -> int:
        return sum(len(lines) for _, _, lines in self._shards)

    def __getitem__(self, index: int) -> BaseScene:
        for images, labels, lines in self._shards:
            if index < len(lines):
                about = json.loads(lines[index])
                things = [Thing(n, c, tuple(box), area) for n, c, box, area in about[0]]
                references = [Reference(t, k, tuple(o)) for t, k, o in about[1]]
                return BaseScene(images[index], labels[index], tuple(things), tuple(references))
            index -= len(lines)
        raise IndexError(index)


def write_shard(
    number: int, folder: Path, world: World, split: str, seed: int, image_size: int
) -> None:
    """Render the scenes of one shard; a scene without objects is skipped."""
    images, labels, lines = [], [], []
    for index in range(number * SHARD, (number + 1) * SHARD):
        scene = render_scene(world, split, index, seed)
        if not scene.objects:
            continue
        size = (image_size, image_size)
        images.append(np.asarray(scene.image.resize(size, Image.Resampling.BICUBIC)))
        labels.append(_object_map(scene))
        lines.append(_line(scene))
    stem = _stem(folder, split, number)
    np.save(f"{stem}-images.npy", np.stack(images))
    np.save(f"{stem}-labels.npy", np.stack(labels))
    stem.with_suffix(".json").write_text("\n".join(lines), encoding="utf-8")


def describe_shard(number: int, folder: Path, world: World, split: str, seed: int) -> None:
    """Rewrite the objects and expressions of a shard; pictures and maps are not changed.

    Raises:
        SystemExit: the shard's pictures are not those of this world, split and seed.
    """
    numbers = range(number * SHARD, (number + 1) * SHARD)
    scenes = (render_scene(world, split, index, seed) for index in numbers)
    lines = [_line(scene) for scene in scenes if scene.objects]
    path = _stem(folder, split, number).with_suffix(".json")
    earlier = path.read_text(encoding="utf-8").splitlines()
    if [json.loads(line)[0] for line in lines] != [json.loads(line)[0] for line in earlier]:
        raise SystemExit(f"{path} holds other scenes: check --world, --split and --seed")
    write_whole(path, "\n".join(lines))


def _stem(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}"


def _line(scene: Scene) -> str:
    """A scene's objects and expressions, with a random generator for each scene."""
    rng = random.Random(f"{scene.split}/{scene.seed}/{scene.index}")
    return json.dumps(_describe(scene, rng))


def _object_map(scene: Scene) -> NDArray[np.uint8]:
    width, height = scene.image.size
    columns = ((np.arange(LABEL_SIDE) + 0.5) / LABEL_SIDE * width).astype(int)
    rows = ((np.arange(LABEL_SIDE) + 0.5) / LABEL_SIDE * height).astype(int)
    labels = np.zeros((LABEL_SIDE, LABEL_SIDE), dtype=np.uint8)
    for number, thing in enumerate(scene.objects):
        labels[thing.mask[np.ix_(rows, columns)]] = number + 1
    return labels


def _describe(scene: Scene, rng: random.Random) -> list[object]:
    width, height = scene.image.size
    sides = (width, height, width, height)
    things = [
        [
            thing.name,
            thing.colour,
            [edge / side for edge, side in zip(thing.box, sides, strict=True)],
            thing.full_area / (width * height),
        ]
        for thing in scene.objects
    ]
    references = [[e.text, e.kind, e.targets] for e in expressions(scene, rng)]
    return [things, references]


def main() -> None:
    """Render shards: ``python -m recipes.embedded_mllm.scenes FOLDER --shards 40``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", default="small", choices=sorted(WORLDS))
    parser.add_argument("--split", default="train")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=144)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--describe-only", action="store_true", help="write new expressions for existing pictures"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write = partial(
        describe_shard if options.describe_only else write_shard,
        folder=options.folder,
        world=WORLDS[options.world],
        split=options.split,
        seed=options.seed,
    )
    if not options.describe_only:
        write = partial(write, image_size=options.image_size)
    with ProcessPoolExecutor(options.workers) as pool:
        list(pool.map(write, range(options.first, options.first + options.shards)))


if __name__ == "__main__":
    main()
