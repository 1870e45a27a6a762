"""How well expressions are understood, by kind: box and count right, or rightly nothing found.

``python -m benchmarks.language --per-kind 25`` asks about unseen scenes in wordings that training
never used (``--trained``: in those it used); ``--free`` asks the expressions of
``language.json``, which were written by hand while looking at the pictures. Right means: as many
boxes as targets, each with an IoU of 0.5 with its own; of an absent thing, no box.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sam4mllm_tool.cli.common import AdapterOption, JsonOption, MllmOption, print_json
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.evaluation.outcome import match_boxes
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.mllm import load_mllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.scenes.expressions import Kind, Wording
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD, WORLDS
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.types import Box, RgbImage

FREE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Question:
    """An expression about a picture and the boxes of what it means, pixels."""

    image: RgbImage
    kind: str
    text: str
    truth: tuple[Box, ...]


def scene_questions(seed: int, per_kind: int, wording: Wording) -> Iterator[Question]:
    """Equally many of each kind about scenes of the test split."""
    limit = per_kind * len(get_args(Kind))
    cases = scene_cases(seed, limit, world=SMALL_WORLD, per_kind=per_kind, wording=wording)
    for case in cases():
        yield Question(case.open_image(), case.kind, case.expression, case.boxes)


def free_questions() -> Iterator[Question]:
    """The expressions written by hand."""
    written = json.loads(FREE.read_text(encoding="utf-8"))

    @cache
    def drawn(index: int) -> Scene:
        return render_scene(WORLDS[written["world"]], written["split"], index, written["seed"])

    for index, kind, targets, text in written["expressions"]:
        scene = drawn(index)
        truth = tuple(Box(*scene.objects[number].box) for number in targets)
        yield Question(RgbImage.from_pil(scene.image), kind, text, truth)


def is_right(model: Sam4MLLM, question: Question) -> bool:
    """Whether the boxes found are those that the expression means."""
    try:
        found = model.locate(question.image, question.text).objects
    except DialogueError:
        return False
    fit = match_boxes([one.box for one in found], question.truth)
    return not found if fit is None else fit >= 0.5


def shares(rows: Sequence[tuple[str, bool]]) -> dict[str, tuple[float, int]]:
    """Share right and number of expressions by kind, ``all`` last."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, right in sorted(rows):
        by_kind[kind].append(right)
    by_kind["all"] = [right for _, right in rows]
    return {kind: (sum(right) / len(right), len(right)) for kind, right in by_kind.items()}


def main(
    free: Annotated[bool, typer.Option(help="The expressions written by hand.")] = False,
    trained: Annotated[bool, typer.Option(help="In the wordings of training.")] = False,
    per_kind: Annotated[int, typer.Option(min=1, help="Expressions of each kind.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the unseen scenes.")] = 4242,
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
    wrong: Annotated[bool, typer.Option(help="Name the expressions misunderstood.")] = False,
) -> None:
    """Share of expressions understood, by kind."""
    model = Sam4MLLM(load_mllm(mllm, adapter=adapter), ColourSegmenter())
    wording: Wording = "train" if trained else "held-out"
    asked = list(free_questions() if free else scene_questions(seed, per_kind, wording))
    rows = [(q.kind, is_right(model, q)) for q in track(asked, disable=as_json)]
    missed = [f"{q.kind}: {q.text}" for q, (_, right) in zip(asked, rows, strict=True) if not right]
    found = shares(rows)
    if as_json:
        print_json({"right": found, "wrong": missed} if wrong else {"right": found})
        return
    table = Table("kind", "right", "of", title="free" if free else f"{wording}, seed {seed}")
    for kind, (share, count) in found.items():
        table.add_row(kind, f"{share:.2f}", str(count))
    console = Console()
    console.print(table)
    if wrong:
        console.print(*missed, sep="\n", markup=False)


if __name__ == "__main__":
    typer.run(main)
