"""``sam4mllm-tool dialogues`` and ``train``: referring data as conversations, and LoRA on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import DeviceOption, SamOption, console
from sam4mllm_tool.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from sam4mllm_tool.evaluation.datasets import ReferringExample
    from sam4mllm_tool.training.dialogues import Conversation

DataOption = Annotated[
    str, typer.Option(help="'scenes', or a data set: refcoco, refcoco+, refcocog, grefcoco, …")
]
FolderOption = Annotated[Path | None, typer.Option(help="Folder of the data set.")]
SplitOption = Annotated[str, typer.Option(help="Split to learn from.")]
CountOption = Annotated[int, typer.Option(min=1, help="Scenes, or records of the data set.")]
PpgOption = Annotated[float, typer.Option(min=0, max=1, help="Share asked the PPG way.")]


def dialogues(
    data: DataOption = "scenes",
    folder: FolderOption = None,
    split: SplitOption = "train",
    count: CountOption = 20,
    show: Annotated[int, typer.Option(min=1, help="Conversations to show.")] = 5,
    ppg: PpgOption = 0.25,
    seed: Annotated[int, typer.Option(help="Other seeds ask other things.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures with the points.")] = None,
    sam: SamOption = "embedded",
) -> None:
    """Show the conversations a data set becomes, and draw their points."""
    from sam4mllm_tool.load import load_sam
    from sam4mllm_tool.training.dialogues import Recipe, conversations

    recipe = Recipe(seed=seed, ppg_share=ppg)
    judge = load_sam(sam) if ppg else None
    found = conversations(_examples(data, folder, split, count, seed), recipe, judge)
    for number, conversation in enumerate(islice(found, show)):
        console.rule(f"image {conversation.image_id}")
        for turn in conversation.turns:
            style = "cyan" if turn.role == "user" else "green"
            console.print(f"[{style}]{turn.role:>9}[/] ", end="")
            console.print(turn.text.strip(), markup=False, highlight=False)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            _draw(conversation).save(out / f"{number:03d}-{conversation.image_id}.png")
    if out is not None:
        console.print(f"drew {show} pictures in {out}", markup=False, highlight=False)


def train(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    base: Annotated[str, typer.Option(help="'embedded', or directory of the base.")] = "embedded",
    data: DataOption = "scenes",
    folder: FolderOption = None,
    split: SplitOption = "train",
    count: CountOption = 2000,
    preset: Annotated[str, typer.Option(help="published or small.")] = "small",
    epochs: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    rate: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    ppg: PpgOption = 0.25,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    sam: SamOption = "embedded",
    device: DeviceOption = "auto",
) -> None:
    """Train a LoRA adapter on referring dialogues."""
    from sam4mllm_tool import embedded
    from sam4mllm_tool.load import EMBEDDED, load_sam
    from sam4mllm_tool.training.dialogues import Conversations, Recipe, chunks
    from sam4mllm_tool.training.lora import PRESETS
    from sam4mllm_tool.training.lora import train as run

    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}", hint=f"Known: {', '.join(PRESETS)}.")
    recipe = replace(PRESETS[preset], seed=seed)
    recipe = replace(recipe, epochs=epochs or recipe.epochs, rate=rate or recipe.rate)
    how = Recipe(seed=seed, ppg_share=ppg)
    about = chunks(_examples(data, folder, split, count, seed), how)
    learnt = Conversations(about, how, load_sam(sam) if ppg else None)
    place = str(embedded.MLLM) if base == EMBEDDED else base
    console.print(f"{len(learnt)} conversations", highlight=False)
    run(place, learnt, out, recipe, how, device=device, resume=resume)
    console.print(f"wrote the adapter to {out}", markup=False, highlight=False, soft_wrap=True)


def _examples(
    data: str, folder: Path | None, split: str, count: int, seed: int
) -> Iterator[ReferringExample]:
    if data == "scenes":
        from sam4mllm_tool.scenes.world import SMALL_WORLD
        from sam4mllm_tool.training.scene_examples import scene_examples

        yield from scene_examples(SMALL_WORLD, split, seed, count)
        return
    from sam4mllm_tool.evaluation.datasets import load_examples

    if folder is None:
        raise InputError("no folder given", hint=f"Say where {data} lies with --folder.")
    yield from load_examples(data, folder, split, count)


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
