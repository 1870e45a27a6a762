"""Scenes written to disk in the layouts of the published referring data sets.

* ``refcoco``: ``refcoco/refs(unc).json`` and ``refcoco/instances.json``, one ref per object with
  its unambiguous expressions as sentences. Upstream's refs are a pickle; a pickle can run code, so
  this is its JSON twin with the same fields. The split "test" is called "testA".
* ``grefcoco``: ``grefcoco/grefs(unc).json`` and ``instances.json``; also plural and absent targets.
* ``reasonseg``: ``SPLIT/NAME.jpg`` and ``SPLIT/NAME.json``, one for each question answered by
  function. Shapes are pixel-exact rectangles, for rasterisers that paint outlines too.
* ``coco``: ``annotations/instances_SPLIT.json`` and ``SPLIT/NAME.jpg``; masks as RLE.
* ``plain``: ``images/NAME.png``, ``masks/NAME_OBJECT.png`` and ``expressions.jsonl``.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.masks.coco import CocoPicture, coco_annotation, coco_document
from sam4mllm_tool.scenes.expressions import ReferringExpression, expressions
from sam4mllm_tool.scenes.render import Mask, Scene, render_scene
from sam4mllm_tool.scenes.sheet import contact_sheet
from sam4mllm_tool.scenes.sprites import plurals
from sam4mllm_tool.scenes.world import FULL_WORLD, World
from sam4mllm_tool.types import Mask as RleMask

Format = Literal["refcoco", "grefcoco", "reasonseg", "coco", "plain"]
COCO_IMAGES = Path("images/mscoco/images/train2014")
CATEGORIES = {name: number for number, name in enumerate(sorted(plurals()), start=1)}
SHEET_SCENES = 24
JPEG_QUALITY = 95

Row = dict[str, Any]
Phrases = list[ReferringExpression]


def export_scenes(
    out: Path,
    seed: int,
    count: int,
    split: str,
    format: Format = "plain",
    sheet: bool = False,
    world: World = FULL_WORLD,
) -> Path:
    """Write `count` scenes of a split, and a contact sheet `sheet.png` if wanted.

    Returns:
        the folder `out`.

    Raises:
        InputError: an unknown format or split, or a count below 1.
    """
    if format not in get_args(Format):
        raise InputError(f"no format {format!r}", hint=f"use one of {', '.join(get_args(Format))}.")
    if count < 1:
        raise InputError(f"{count} scenes cannot be written", hint="ask for one or more.")
    scenes = [render_scene(world, split, index, seed) for index in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    _WRITERS[format](out, scenes, split)
    if sheet:
        contact_sheet(scenes[:SHEET_SCENES]).save(out / "sheet.png")
    return out


def _phrases(scene: Scene) -> Phrases:
    return expressions(scene, random.Random(scene.index))


def _write_plain(out: Path, scenes: Sequence[Scene], split: str) -> None:
    for folder in ("images", "masks"):
        (out / folder).mkdir(exist_ok=True)
    with (out / "expressions.jsonl").open("w", encoding="utf-8") as lines:
        for scene in scenes:
            name = f"{scene.index:06d}"
            scene.image.save(out / "images" / f"{name}.png")
            for number, thing in enumerate(scene.objects):
                RleMask(thing.mask).to_pil().save(out / "masks" / f"{name}_{number}.png")
            for phrase in _phrases(scene):
                row = {
                    "image": f"images/{name}.png",
                    "text": phrase.text,
                    "kind": phrase.kind,
                    "masks": [f"masks/{name}_{number}.png" for number in phrase.targets],
                    "boxes": [scene.objects[number].box for number in phrase.targets],
                }
                lines.write(json.dumps(row) + "\n")


def _write_coco(out: Path, scenes: Sequence[Scene], split: str) -> None:
    names = {scene.index: f"{scene.index:012d}.jpg" for scene in scenes}
    _save_pictures(out / split, scenes, names)
    _write_json(out / "annotations" / f"instances_{split}.json", _instances(scenes, names))


def _write_refcoco(out: Path, scenes: Sequence[Scene], split: str) -> None:
    _write_refer(out, scenes, split, "refcoco", "refs(unc).json", _refs)


def _write_grefcoco(out: Path, scenes: Sequence[Scene], split: str) -> None:
    _write_refer(out, scenes, split, "grefcoco", "grefs(unc).json", _grefs)


def _write_refer(
    out: Path,
    scenes: Sequence[Scene],
    split: str,
    folder: str,
    refs_file: str,
    rows: Callable[[Scene], Iterator[Row]],
) -> None:
    """Pictures, `instances.json` and the refs, numbered and with the split's published name."""
    names = {scene.index: f"COCO_train2014_{_image_id(scene):012d}.jpg" for scene in scenes}
    _save_pictures(out / COCO_IMAGES, scenes, names)
    _write_json(out / folder / "instances.json", _instances(scenes, names))
    refs: list[Row] = []
    sentences = 0
    for scene in scenes:
        for row in rows(scene):
            texts = row.pop("texts")
            written = [_sentence(text, sentences + place) for place, text in enumerate(texts)]
            refs.append(
                {
                    "ref_id": len(refs) + 1,
                    "image_id": _image_id(scene),
                    "file_name": names[scene.index],
                    "split": "testA" if split == "test" else split,
                    "sent_ids": [one["sent_id"] for one in written],
                    "sentences": written,
                    **row,
                }
            )
            sentences += len(texts)
    _write_json(out / folder / refs_file, refs)


def _refs(scene: Scene) -> Iterator[Row]:
    """One row per object that an expression identifies uniquely."""
    for number, thing in enumerate(scene.objects):
        texts = [phrase.text for phrase in _phrases(scene) if phrase.targets == (number,)]
        if texts:
            yield {
                "ann_id": _annotation_id(scene, number),
                "category_id": CATEGORIES[thing.name],
                "texts": texts,
            }


def _grefs(scene: Scene) -> Iterator[Row]:
    """One row per set of targets; [-1] stands for no target, as in gRefCOCO."""
    by_targets: dict[tuple[int, ...], list[str]] = {}
    for phrase in _phrases(scene):
        by_targets.setdefault(phrase.targets, []).append(phrase.text)
    for targets, texts in by_targets.items():
        yield {
            "ann_id": [_annotation_id(scene, number) for number in targets] or [-1],
            "category_id": [CATEGORIES[scene.objects[n].name] for n in targets] or [-1],
            "no_target": not targets,
            "texts": texts,
        }


def _write_reasonseg(out: Path, scenes: Sequence[Scene], split: str) -> None:
    folder = out / split
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        asked = [phrase for phrase in _phrases(scene) if phrase.kind == "function"]
        for place, phrase in enumerate(asked):
            name = f"{scene.index:06d}_{place}"
            scene.image.save(folder / f"{name}.jpg", quality=JPEG_QUALITY)
            mask = scene.objects[phrase.targets[0]].mask
            shapes = [
                {
                    "label": "target",
                    "labels": ["target"],
                    "shape_type": "polygon",
                    "image_name": f"{name}.jpg",
                    "points": corners,
                }
                for corners in rectangles(mask)
            ]
            notes = {"text": [phrase.text], "is_sentence": True, "shapes": shapes}
            _write_json(folder / f"{name}.json", notes)


def rectangles(mask: Mask) -> list[list[list[int]]]:
    """Rectangles that tile a mask: four [x, y] pixel indices each, inclusive."""
    found: list[list[list[int]]] = []
    growing: dict[tuple[int, int], int] = {}
    for y, row in enumerate(np.vstack([mask, np.zeros_like(mask[:1])])):
        steps = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        runs = {(int(a), int(b) - 1) for a, b in steps.reshape(-1, 2)}
        for first, last in [run for run in growing if run not in runs]:
            top = growing.pop((first, last))
            found.append([[first, top], [last, top], [last, y - 1], [first, y - 1]])
        for run in runs:
            growing.setdefault(run, y)
    return found


def _instances(scenes: Sequence[Scene], names: dict[int, str]) -> Row:
    """A COCO instances file: images, annotations with RLE masks, categories."""
    pictures = [
        CocoPicture(
            names[scene.index],
            scene.image.width,
            scene.image.height,
            [
                (
                    thing.name,
                    coco_annotation(RleMask(thing.mask), id=_annotation_id(scene, number)),
                )
                for number, thing in enumerate(scene.objects)
            ],
            _image_id(scene),
        )
        for scene in scenes
    ]
    return coco_document(pictures, CATEGORIES)


def _image_id(scene: Scene) -> int:
    return scene.index + 1


def _annotation_id(scene: Scene, number: int) -> int:
    return 100 * _image_id(scene) + number


def _sentence(text: str, number: int) -> Row:
    words = "".join(letter for letter in text.lower() if letter.isalnum() or letter in " -")
    return {"sent_id": number, "sent": text, "raw": text, "tokens": words.split()}


def _save_pictures(folder: Path, scenes: Sequence[Scene], names: dict[int, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        scene.image.save(folder / names[scene.index], quality=JPEG_QUALITY)


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


_WRITERS: dict[str, Callable[[Path, Sequence[Scene], str], None]] = {
    "plain": _write_plain,
    "coco": _write_coco,
    "refcoco": _write_refcoco,
    "grefcoco": _write_grefcoco,
    "reasonseg": _write_reasonseg,
}
