"""Questions without masks, mixed in so that a model keeps its other abilities.

LLaVA's instruction files (a JSON list of records with ``image`` and ``conversations``, turns of
``human`` and ``gpt``) are read as they are; scenes give questions of their own.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam4mllm_tool.errors import DatasetError
from sam4mllm_tool.geometry import to_grid
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import World
from sam4mllm_tool.types import RgbImage

IMAGE_MARK = "<image>"
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


def llava_vqa(file: Path, images: Path) -> list[VqaExample]:
    """The records of a LLaVA instruction file that have a picture.

    Args:
        file: JSON list of ``{"id", "image", "conversations": [{"from", "value"}, …]}``.
        images: folder that the ``image`` paths are relative to.

    Raises:
        DatasetError: not such a file.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        return [
            VqaExample(str(record["id"]), images / record["image"], _pairs(record))
            for record in records
            if "image" in record
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{file} is no LLaVA instruction file: {error!r}",
            hint='It should be a JSON list of {"id", "image", "conversations"}.',
        ) from error


def _pairs(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    said = [str(turn["value"]).replace(IMAGE_MARK, "").strip() for turn in record["conversations"]]
    return tuple(zip(said[::2], said[1::2], strict=False))


def scene_vqa(world: World, split: str, seed: int, count: int, first: int = 0) -> list[VqaExample]:
    """What lies at some places of ``count`` scenes: a name's last word, or "background".

    A scene in which nothing found room is left out.
    """
    scenes = (render_scene(world, split, first + n, seed) for n in range(count))
    return [_ask_places(scene) for scene in scenes if scene.objects]


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
        box = rng.choice(scene.objects).box if number % 2 == 0 else whole
        left, top, right, bottom = box
        yield int(rng.uniform(left, right - 1)), int(rng.uniform(top, bottom - 1))


def _ask_place(scene: Scene, x: int, y: int) -> tuple[str, str]:
    width, height = scene.image.size
    found = [thing.name for thing in scene.objects if thing.mask[y, x]]
    answer = found[0].split()[-1] if found else BACKGROUND
    return f"What is at ({to_grid(x + 0.5, width):03d},{to_grid(y + 0.5, height):03d})?", answer
