"""Several data sets in one run: which, how much of each, and which pictures to leave out.

A run's conversations are listed before training begins: the sets one after another, each with its
share. The trainer shuffles the list by its seed, so the same command gives the same batches, and a
resumed run continues with the batch at which it stopped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sam4mllm_tool.datasets import DATASETS, VQA_SETS, ReferringExample, load_examples
from sam4mllm_tool.datasets.scenes import scene_examples
from sam4mllm_tool.datasets.vqa import SceneVqa, VqaExample
from sam4mllm_tool.errors import DatasetError, InputError
from sam4mllm_tool.scenes.world import SMALL_WORLD, WORLDS
from sam4mllm_tool.training.dialogues import Chunk, Recipe, chunks

SCENES = "scenes"
SCENE_COUNT, VQA_SCENES = 2000, 400
_SHARE = re.compile(r":(\d+\.?\d*|\.\d+)$")


@dataclass(frozen=True)
class Source:
    """One set of a mixture.

    Attributes:
        name: ``scenes``, or a key of ``DATASETS`` or ``VQA_SETS``.
        path: of its files; ``None`` for scenes.
        share: of its conversations that an epoch holds: 0.5 is a random half, 2 each of them twice.
    """

    name: str
    path: Path | None = None
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """``NAME=PATH``, ``NAME=PATH:SHARE``, ``scenes`` or ``scenes:SHARE``.

        Raises:
            InputError: not of that form, an unknown name, or a share of 0.
        """
        found = _SHARE.search(text)
        share = float(found[1]) if found else 1.0
        name, equals, path = (text[: found.start()] if found else text).partition("=")
        if name not in (SCENES, *DATASETS, *VQA_SETS):
            known = ", ".join([SCENES, *DATASETS, *VQA_SETS])
            raise InputError(f"no data set {name!r}", hint=f"Known: {known}.")
        if bool(equals and path) == (name == SCENES):
            raise InputError(
                f"{text!r} has no path of {name}" if name != SCENES else f"{text!r}?",
                hint="Write NAME=PATH, NAME=PATH:SHARE, or scenes.",
            )
        if share <= 0:
            raise InputError(f"{text!r} has no share", hint="A share is above 0: 0.5, 1, 2.")
        return cls(name, Path(path).expanduser() if path else None, share)


@dataclass(frozen=True)
class SceneDraw:
    """Which synthetic scenes there are.

    Attributes:
        worlds: NAME or NAME:N; in each turn N scenes of each.
        count: turns.
    """

    worlds: Sequence[str] = ("small",)
    count: int | None = None

    def examples(
        self, split: str, seed: int, count: int | None = None
    ) -> Iterator[ReferringExample]:
        """The expressions of the scenes, worlds in turns.

        Raises:
            InputError: no such world, or no number of scenes.
        """
        turns = [_turn(world) for world in self.worlds]
        for index in range(count or self.count or SCENE_COUNT):
            for name, scenes in turns:
                yield from scene_examples(WORLDS[name], split, seed, scenes, first=index * scenes)


def records(
    source: Source, split: str, scenes: SceneDraw, seed: int, limit: int | None = None
) -> Iterator[ReferringExample]:
    """A referring source's records.

    Args:
        limit: at most so many records, or turns of scenes.
    """
    if source.path is None:
        return scenes.examples(split, seed, limit)
    return load_examples(source.name, source.path, split, limit)


def mixture(
    sources: Sequence[Source],
    recipe: Recipe,
    split: str,
    scenes: SceneDraw,
    excluded: frozenset[str] = frozenset(),
    limit: int | None = None,
) -> list[Chunk | VqaExample]:
    """The contents of each conversation of an epoch, source by source; no picture is opened.

    Args:
        excluded: ids of pictures to leave out.
        limit: most records of each source.
    """
    found: list[Chunk | VqaExample] = []
    for source in sources:
        about: list[Chunk | VqaExample]
        if source.name in VQA_SETS:
            assert source.path is not None
            asked = VQA_SETS[source.name](source.path, split)
            about = list(islice((o for o in asked if coco_id(o) not in excluded), limit))
        else:
            some = records(source, split, scenes, recipe.seed, limit)
            about = list(chunks(some, recipe, _scene_vqa(source, recipe, split), excluded))
        found += shared(about, source.share, random.Random(f"{recipe.seed}/{source.name}"))
    return found


def shared(
    about: Sequence[Chunk | VqaExample], share: float, rng: random.Random
) -> list[Chunk | VqaExample]:
    """Each item ``int(share)`` times, and a random fraction of them once more, in order."""
    whole, part = divmod(share, 1)
    more = set(rng.sample(range(len(about)), round(part * len(about))))
    times = [int(whole) + (number in more) for number in range(len(about))]
    return [one for one, count in zip(about, times, strict=True) for _ in range(count)]


def excluded_pictures(
    sources: Sequence[Source], others: Sequence[Source], say: Callable[[str], None]
) -> frozenset[str]:
    """Ids of the val and test pictures of all referring sets named.

    A missing split of a training set is reported and skipped; a missing split of a set to be left
    out is an error.

    Raises:
        DatasetError: as above.
    """
    found: set[str] = set()
    for source in [*sources, *others]:
        if source.path is None or source.name not in DATASETS:
            continue
        for split in DATASETS[source.name].splits:
            if split == "train":
                continue
            try:
                found |= {e.image_id for e in load_examples(source.name, source.path, split)}
            except DatasetError as error:
                if source in others:
                    raise
                say(f"{source.name}: {split} pictures are not left out: {error}")
    return frozenset(found)


def held_out(
    sources: Sequence[Source], split: str, scenes: SceneDraw, seed: int, count: int
) -> list[ReferringExample]:
    """About ``count`` records (or scenes) to evaluate a model on, from all referring sources."""
    asked = [source for source in sources if source.name not in VQA_SETS]
    found: list[ReferringExample] = []
    for source in asked:
        each = -(-count // len(asked))
        if source.path is None:
            found += scenes.examples(split, seed, each)
            continue
        every = list(load_examples(source.name, source.path, split))
        found += random.Random(seed).sample(every, min(each, len(every)))
    return found


def coco_id(example: VqaExample) -> str:
    """The picture's number where its file is named as COCO does, as RefCOCO names pictures."""
    if isinstance(example.image, Path):
        digits = example.image.stem.rpartition("_")[2]
        if len(digits) == 12 and digits.isdigit():
            return str(int(digits))
    return example.image_id


def _scene_vqa(source: Source, recipe: Recipe, split: str) -> Sequence[VqaExample]:
    """Questions about what lies where in scenes, if a share of them is wanted."""
    if source.path is not None or not recipe.vqa_share:
        return []
    return SceneVqa(SMALL_WORLD, split, recipe.seed, VQA_SCENES)


def _turn(world: str) -> tuple[str, int]:
    """NAME or NAME:N as a world's name and its scenes per turn."""
    name, _, scenes = world.partition(":")
    if name not in WORLDS:
        raise InputError(f"no world {name!r}", hint=f"Known: {', '.join(sorted(WORLDS))}.")
    if scenes and not (scenes.isdigit() and int(scenes)):
        raise InputError(f"no number of scenes in {world!r}", hint=f"Write {name}:2, say.")
    return name, int(scenes or 1)
