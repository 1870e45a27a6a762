"""Questions without masks, mixed in so that a model keeps its other abilities: the record, and
the questions about scenes. Each data set has a file of its own.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from sam4mllm_tool.geometry import to_grid
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import World
from sam4mllm_tool.types import RgbImage

SHORTLY = "Answer the question using a single word or phrase."
"""What LLaVA-1.5's data asks for where the answers are short."""
BACKGROUND = "background"
"""The answer where a scene holds nothing."""


@dataclass(frozen=True)
class VqaExample:
    """Questions with plain answers about one picture: a file, or its encoded bytes."""

    image_id: str
    image: Path | bytes
    pairs: tuple[tuple[str, str], ...]

    def open_image(self) -> RgbImage:
        """The picture.

        Raises:
            ImageError: it cannot be read.
        """
        return load_image(self.image).image


@dataclass(frozen=True)
class SceneVqa(Sequence[VqaExample]):
    """What lies at some places of ``scenes`` scenes: a name's last word, or "background".

    A scene is drawn when its questions are asked for, and once only: few conversations of a small
    training set are about them.
    """

    world: World
    split: str
    seed: int
    scenes: int
    _drawn: dict[int, VqaExample] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.scenes

    @overload
    def __getitem__(self, index: int) -> VqaExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[VqaExample]: ...

    def __getitem__(self, index: int | slice) -> VqaExample | list[VqaExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(self.scenes)[index]]
        number = range(self.scenes)[index]
        if number not in self._drawn:
            scene = render_scene(self.world, self.split, number, self.seed)
            self._drawn[number] = _ask_places(scene)
        return self._drawn[number]


def _ask_places(scene: Scene, questions: int = 5) -> VqaExample:
    rng = random.Random(f"{scene.seed}/{scene.index}/vqa")
    stream = io.BytesIO()
    scene.image.save(stream, "PNG", compress_level=1)
    pairs = tuple(_ask_place(scene, x, y) for x, y in _places(scene, questions, rng))
    return VqaExample(f"{scene.index}", stream.getvalue(), pairs)


def _places(scene: Scene, count: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Pixels, half of them in the box of some object."""
    whole = (0.0, 0.0, float(scene.image.width), float(scene.image.height))
    for number in range(count):
        aimed = number % 2 == 0 and scene.objects
        box = rng.choice(aimed).box if aimed else whole
        left, top, right, bottom = box
        yield int(rng.uniform(left, right - 1)), int(rng.uniform(top, bottom - 1))


def _ask_place(scene: Scene, x: int, y: int) -> tuple[str, str]:
    width, height = scene.image.size
    found = [thing.name for thing in scene.objects if thing.mask[y, x]]
    answer = found[0].split()[-1] if found else BACKGROUND
    return f"What is at ({to_grid(x + 0.5, width):03d},{to_grid(y + 0.5, height):03d})?", answer
