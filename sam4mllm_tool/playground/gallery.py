"""Pictures to choose from: the demo picture, drawn scenes, and the pictures of a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

from sam4mllm_tool import embedded
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.folders import read_file
from sam4mllm_tool.images.sources import pictures_below

SCENE_SEED = 7
SCENES = 7
MAX_FILES = 60
"""A folder may hold many pictures; the page shows only the first ones."""
MAX_EXPRESSIONS = 6


@dataclass(frozen=True)
class Offer:
    """A picture in the gallery.

    Attributes:
        name: file name.
        kind: a drawn scene, or a file of the folder.
        read: returns the encoded picture.
        expressions: suggested expressions; the last one of a scene matches nothing in it.
    """

    name: str
    kind: Literal["scene", "file"]
    read: Callable[[], bytes] = field(repr=False)
    expressions: tuple[str, ...] = ()


def gallery(folder: Path | None, policy: ImagePolicy) -> list[Offer]:
    """The shipped scenes, then the pictures of ``folder``.

    Raises:
        InputError: ``folder`` is not a folder, or holds no pictures.
    """
    files: Sequence[Path] = pictures_below(folder)[:MAX_FILES] if folder else ()
    offers = [Offer(p.name, "file", lambda p=p: read_file(p, policy)) for p in files]  # type: ignore[misc]
    return [_demo(), *(_scene(index) for index in range(SCENES)), *offers]


def _demo() -> Offer:
    question = json.loads((embedded.DEMO / "demo.json").read_text(encoding="utf-8"))
    picture = embedded.DEMO / question["picture"]
    suggestions = ("the tree", "all the clocks", "the dog")
    return Offer(picture.name, "scene", picture.read_bytes, (question["expression"], *suggestions))


@lru_cache(maxsize=SCENES)
def _scene(index: int) -> Offer:
    """A scene that no embedded model was trained on, with one expression of each kind."""
    from sam4mllm_tool.scenes.expressions import expressions
    from sam4mllm_tool.scenes.render import render_scene
    from sam4mllm_tool.scenes.world import SMALL_WORLD

    scene = render_scene(SMALL_WORLD, "val", index, SCENE_SEED)
    available = expressions(scene, random.Random(index))
    by_kind = {one.kind: one.text for one in reversed([one for one in available if one.targets])}
    texts = list(reversed(by_kind.values()))[: MAX_EXPRESSIONS - 1]
    absent = next((one.text for one in available if not one.targets), None)
    stream = BytesIO()
    scene.image.save(stream, "PNG")
    return Offer(
        f"scene-{index + 1}.png", "scene", stream.getvalue, (*texts, *filter(None, [absent]))
    )
