"""Scenes rendered once into memory-mapped arrays, so that a trainer never waits for drawing."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import WORLDS

BLOCK = 250  # scenes a worker draws at a time


@dataclass(frozen=True)
class SceneCache:
    """Rendered scenes.

    Attributes:
        images: uint8 N x S x S x 3.
        labels: int8 N x S x S, number of the visible object or -1.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.images)


def build_scene_cache(
    directory: Path, world: str, split: str, seed: int, count: int, side: int, workers: int = 1
) -> Iterator[int]:
    """Draw scenes 0 … count-1 of a split into `directory`; yields how many are done.

    A cache that is there with the same settings is kept and only completed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"world": world, "split": split, "seed": seed, "count": count, "side": side}
    state = directory / "cache.json"
    done = 0
    if state.exists():
        former = json.loads(state.read_text())
        done = former.pop("done") if {**former, "done": None} == {**settings, "done": None} else 0
    if done == 0:
        _create(directory, count, side)
    tasks = [(start, min(start + BLOCK, count)) for start in range(done, count, BLOCK)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        jobs = zip(repeat((directory, world, split, seed, side)), tasks, strict=False)
        for end in pool.imap(_draw_block, jobs):
            state.write_text(json.dumps({**settings, "done": end}))
            yield end


def open_scene_cache(directory: Path) -> SceneCache:
    """The scenes drawn so far."""
    done = json.loads((directory / "cache.json").read_text())["done"]
    images = np.load(directory / "images.npy", mmap_mode="r")
    labels = np.load(directory / "labels.npy", mmap_mode="r")
    return SceneCache(images[:done], labels[:done])


def _create(directory: Path, count: int, side: int) -> None:
    shape = (count, side, side)
    np.lib.format.open_memmap(directory / "images.npy", "w+", np.uint8, (*shape, 3))
    np.lib.format.open_memmap(directory / "labels.npy", "w+", np.int8, shape)


def _draw_block(job: tuple[tuple[Path, str, str, int, int], tuple[int, int]]) -> int:
    (directory, world, split, seed, side), (start, end) = job
    images = np.load(directory / "images.npy", mmap_mode="r+")
    labels = np.load(directory / "labels.npy", mmap_mode="r+")
    for index in range(start, end):
        scene = render_scene(WORLDS[world], split, index, seed, side)
        images[index] = np.asarray(scene.image)
        labels[index] = -1
        for number, thing in enumerate(scene.objects):
            labels[index][thing.mask] = number
    return end
