"""``sam4mllm-tool dialogues``: the conversations that data sets become, to read and look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import console
from sam4mllm_tool.cli.training import (
    SMALL,
    CountOption,
    DataOption,
    ExcludeOption,
    GridsOption,
    HardPointsOption,
    JitterOption,
    JudgeOption,
    PointsOption,
    PpgOption,
    PresetOption,
    ReferencesOption,
    SharedBoxesOption,
    SplitOption,
    VqaShareOption,
    WorldOption,
    candidate_changes,
    dialogues_of,
    excluded_ids,
    fitting_preset,
    judge_of,
    preset_named,
    sources_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from sam4mllm_tool.training.dialogues import Conversation


def dialogues(
    data: DataOption = ["scenes"],  # noqa: B006
    world: WorldOption = [SMALL],  # noqa: B006
    split: SplitOption = "train",
    count: CountOption = None,
    preset: PresetOption = None,
    show: Annotated[int, typer.Option(min=1, help="Conversations to show per set.")] = 5,
    ppg: PpgOption = None,
    references: ReferencesOption = None,
    points: PointsOption = None,
    grids: GridsOption = None,
    jitter: JitterOption = None,
    hard_points: HardPointsOption = None,
    shared_boxes: SharedBoxesOption = None,
    vqa_share: VqaShareOption = None,
    exclude: ExcludeOption = None,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures with the points.")] = None,
    sam: JudgeOption = None,
) -> None:
    """Show the conversations that data sets become, and draw their points."""
    from sam4mllm_tool.segmenter import load_segmenter
    from sam4mllm_tool.training.dialogues import converse
    from sam4mllm_tool.training.mixture import SceneDraw, mixture

    sources = sources_of(data)
    chosen = preset_named(preset or fitting_preset("embedded", sources))
    recipe = dialogues_of(
        chosen, sources, seed, ppg, references, vqa_share,
        candidate_changes(points, grids, jitter, hard_points, shared_boxes),
    )  # fmt: skip
    judge = load_segmenter(judge_of(chosen, sam)) if recipe.ppg_share else None
    scenes = SceneDraw(world, count or 20)
    left_out = excluded_ids(sources, exclude, split)
    drawn = 0
    for source in sources:
        about = mixture([source], recipe, split, scenes, left_out, limit=count)[:show]
        for conversation in (converse(one, recipe, judge) for one in about):
            console.rule(f"{source.name}: image {conversation.image_id}")
            for turn in conversation.turns:
                style = "cyan" if turn.role == "user" else "green"
                console.print(f"[{style}]{turn.role:>9}[/] ", end="")
                console.print(turn.text.strip(), markup=False, highlight=False)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                name = conversation.image_id.replace("/", "-")
                _draw(conversation).save(out / f"{drawn:03d}-{source.name}-{name}.png")
            drawn += 1
    if out is not None:
        console.print(f"drew {drawn} pictures in {out}", markup=False, highlight=False)


def _draw(conversation: Conversation) -> Image.Image:
    """The picture with the points of its questions: green on the object, red off it."""
    from PIL import ImageDraw

    from sam4mllm_tool.types import PointLabel

    picture = conversation.image.pil.copy()
    pen = ImageDraw.Draw(picture)
    for points in conversation.points.values():
        for point in points:
            colour = "lime" if point.label is PointLabel.FOREGROUND else "red"
            pen.circle((point.x, point.y), 2, fill=colour, outline="black")
    return picture
