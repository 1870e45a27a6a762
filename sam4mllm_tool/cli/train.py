"""``sam4mllm-tool dialogues`` and ``train``: referring data as conversations, and LoRA on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam4mllm_tool.cli.common import DeviceOption, SamOption, console
from sam4mllm_tool.errors import DatasetError, InputError

if TYPE_CHECKING:
    from PIL import Image

    from sam4mllm_tool.datasets import ReferringExample
    from sam4mllm_tool.datasets.vqa import VqaExample
    from sam4mllm_tool.training.candidates import Candidates
    from sam4mllm_tool.training.dialogues import Conversation, Recipe

SCENES, SMALL = "scenes", "small"
VQA_SCENES = 400
DataOption = Annotated[
    str, typer.Option(help="'scenes', or a data set: refcoco, refcoco+, refcocog, grefcoco, …")
]
WorldOption = Annotated[
    list[str],
    typer.Option(
        help="Of scenes; repeatable: in each of COUNT turns one scene of each, or NAME:N."
    ),
]
FolderOption = Annotated[Path | None, typer.Option(help="Folder of the data set.")]
SplitOption = Annotated[str, typer.Option(help="Split to learn from.")]
CountOption = Annotated[int, typer.Option(min=1, help="Scenes, or records of the data set.")]
PpgOption = Annotated[float, typer.Option(min=0, max=1, help="Share asked the PPG way.")]
ReferencesOption = Annotated[int, typer.Option(min=1, help="Most references a conversation.")]
PointsOption = Annotated[int, typer.Option(min=1, help="Most points a round-2 question.")]
GridsOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of round-2 questions about an even grid.")
]
JitterOption = Annotated[
    float,
    typer.Option(min=0, max=0.5, help="How far the edges of round 2's boxes move, of a side."),
]
HardPointsOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Share of round-2 points off the object moved onto others in the box."
    ),
]
SharedBoxesOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share of round-2 boxes that hold an overlapping object too; "
                 "its expressions get the same box and points."),
]  # fmt: skip
VqaOption = Annotated[
    Path | None,
    typer.Option(help="LLaVA instruction file to mix in; scenes ask what lies where without one."),
]
VqaImagesOption = Annotated[Path | None, typer.Option(help="Folder of that file's pictures.")]
VqaShareOption = Annotated[float, typer.Option(min=0, max=0.9, help="Share of VQA conversations.")]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Data sets in the same folder whose val and test pictures are left out too; those "
        "of the data set itself always are."
    ),
]
# Scenes say "0+" of absent things alone; asked so, the model would learn just that. With half of
# the others asked so, it refused a quarter of the compound expressions.
LOOSENED = 0.85


def dialogues(
    data: DataOption = SCENES,
    world: WorldOption = [SMALL],  # noqa: B006
    folder: FolderOption = None,
    split: SplitOption = "train",
    count: CountOption = 20,
    show: Annotated[int, typer.Option(min=1, help="Conversations to show.")] = 5,
    ppg: PpgOption = 0.25,
    references: ReferencesOption = 5,
    points: PointsOption = 30,
    grids: GridsOption = 0.0,
    jitter: JitterOption = 0.1,
    hard_points: HardPointsOption = 0.0,
    shared_boxes: SharedBoxesOption = 0.0,
    vqa: VqaOption = None,
    vqa_images: VqaImagesOption = None,
    vqa_share: VqaShareOption = 0.0,
    exclude: ExcludeOption = None,
    seed: Annotated[int, typer.Option(help="Other seeds ask other things.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures with the points.")] = None,
    sam: SamOption = "embedded",
) -> None:
    """Show the conversations a data set becomes, and draw their points."""
    from sam4mllm_tool.segmenter import load_segmenter
    from sam4mllm_tool.training.dialogues import conversations

    asked = _candidates(points, grids, jitter, hard_points, shared_boxes)
    recipe = _recipe(data, seed, ppg, references, asked, vqa_share)
    judge = load_segmenter(sam) if ppg else None
    found = conversations(
        _examples(data, world, folder, split, count, seed),
        recipe,
        judge,
        _vqa(data, recipe, vqa, vqa_images, split),
        _excluded(data, folder, split, exclude or []),
    )
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
    data: DataOption = SCENES,
    world: WorldOption = [SMALL],  # noqa: B006
    folder: FolderOption = None,
    split: SplitOption = "train",
    count: CountOption = 2000,
    preset: Annotated[str, typer.Option(help="published or small.")] = "small",
    epochs: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    rate: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Instead of the preset's: conversations a step.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    vision: Annotated[bool, typer.Option(help="LoRA layers in the vision tower too.")] = False,
    bf16: Annotated[bool | None, typer.Option(help="Instead of the preset's.")] = None,
    ppg: PpgOption = 0.25,
    references: ReferencesOption = 5,
    points: PointsOption = 30,
    grids: GridsOption = 0.0,
    jitter: JitterOption = 0.1,
    hard_points: HardPointsOption = 0.0,
    shared_boxes: SharedBoxesOption = 0.0,
    tokens: Annotated[int, typer.Option(min=64, help="Most tokens a conversation.")] = 2048,
    vqa: VqaOption = None,
    vqa_images: VqaImagesOption = None,
    vqa_share: VqaShareOption = 0.0,
    exclude: ExcludeOption = None,
    held_out: Annotated[
        int, typer.Option(min=0, help="Scenes or records to examine the model on as it learns.")
    ] = 0,
    held_out_split: Annotated[str, typer.Option(help="Their split.")] = "val",
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    deepspeed: Annotated[Path | None, typer.Option(help="DeepSpeed configuration.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write OUT/tensorboard.")] = False,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="An adapter of the same rank to go on from, on other data.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    sam: SamOption = "embedded",
    device: DeviceOption = "auto",
) -> None:
    """Train a LoRA adapter on referring dialogues."""
    from sam4mllm_tool import embedded
    from sam4mllm_tool.evaluation.cases import cases_of
    from sam4mllm_tool.segmenter import load_segmenter
    from sam4mllm_tool.training.dialogues import Conversations, chunks
    from sam4mllm_tool.training.lora import PRESETS
    from sam4mllm_tool.training.lora import train as run
    from sam4mllm_tool.training.progress import HeldOut

    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}", hint=f"Known: {', '.join(PRESETS)}.")
    kept = PRESETS[preset]
    recipe = replace(
        kept,
        seed=seed,
        longest=tokens,
        epochs=epochs or kept.epochs,
        rate=rate or kept.rate,
        batch=batch or kept.batch,
        rank=rank or kept.rank,
        vision=vision,
        alpha=2 * rank if rank else kept.alpha,
        bf16=kept.bf16 if bf16 is None else bf16,
    )
    candidates = _candidates(points, grids, jitter, hard_points, shared_boxes)
    how = _recipe(data, seed, ppg, references, candidates, vqa_share)
    judge = load_segmenter(sam) if ppg or held_out else None
    about = chunks(
        _examples(data, world, folder, split, count, seed),
        how,
        _vqa(data, how, vqa, vqa_images, split),
        _excluded(data, folder, split, exclude or []),
    )
    learnt = Conversations(about, how, judge if ppg else None)
    asked = list(_examples(data, world, folder, held_out_split, held_out, seed)) if held_out else []
    place = str(embedded.MLLM) if base == embedded.NAME else base
    console.print(f"{len(learnt)} conversations", highlight=False)
    run(
        place,
        learnt,
        out,
        recipe,
        how,
        device=device,
        resume=resume,
        save_steps=save_steps,
        held_out=Conversations(chunks(asked, how), how),
        examined=HeldOut(list(cases_of(asked)), judge) if asked and judge else None,
        start=start,
        deepspeed=deepspeed,
        tensorboard=tensorboard,
        show_progress=True,
    )
    console.print(f"wrote the adapter to {out}", markup=False, highlight=False, soft_wrap=True)


def _candidates(
    points: int, grids: float, jitter: float, hard_points: float, shared_boxes: float
) -> Candidates:
    from sam4mllm_tool.training.candidates import Candidates

    return Candidates(
        asked=(1, points),
        grids=grids,
        jitter=jitter,
        hard_points=hard_points,
        shared_boxes=shared_boxes,
    )


def _recipe(
    data: str, seed: int, ppg: float, references: int, candidates: Candidates, vqa_share: float
) -> Recipe:
    from sam4mllm_tool.training.dialogues import Recipe

    return Recipe(
        seed=seed,
        ppg_share=ppg,
        references=references,
        candidates=candidates,
        vqa_share=vqa_share,
        loosened=LOOSENED if data == SCENES else 0.0,
    )


def _vqa(
    data: str, recipe: Recipe, file: Path | None, images: Path | None, split: str
) -> list[VqaExample]:
    """What is mixed in, if anything is."""
    from sam4mllm_tool.datasets.vqa import llava_vqa, scene_vqa

    if file is not None:
        return llava_vqa(file, images or file.parent)
    if not recipe.vqa_share:
        return []
    if data != SCENES:
        raise InputError("no VQA file given", hint="Say with --vqa what should be mixed in.")
    from sam4mllm_tool.scenes.world import SMALL_WORLD

    return scene_vqa(SMALL_WORLD, split, recipe.seed, VQA_SCENES)


def _excluded(data: str, folder: Path | None, split: str, others: list[str]) -> frozenset[str]:
    """Pictures of val and test splits, if it is a training split that is learnt from.

    A split of the data set itself that is not there is told and passed over.
    """
    from sam4mllm_tool.datasets import DATASETS, load_examples

    if data == SCENES or folder is None or split != "train":
        return frozenset()
    found: set[str] = set()
    for name in dict.fromkeys([data, *others]):
        parts = DATASETS[name].splits if name in DATASETS else ("val",)
        for part in parts:
            if part == "train":
                continue
            try:
                found |= {example.image_id for example in load_examples(name, folder, part)}
            except DatasetError as error:
                if name != data:
                    raise
                console.print(f"[yellow]{part} pictures are not left out:[/] {error}")
    return frozenset(found)


def _examples(
    data: str, worlds: Sequence[str], folder: Path | None, split: str, count: int, seed: int
) -> Iterator[ReferringExample]:
    if data == SCENES:
        from sam4mllm_tool.datasets.scenes import scene_examples
        from sam4mllm_tool.scenes.world import WORLDS

        turns = [_turn(world) for world in worlds]
        for index in range(count):
            for name, scenes in turns:
                yield from scene_examples(WORLDS[name], split, seed, scenes, first=index * scenes)
        return
    from sam4mllm_tool.datasets import load_examples

    if folder is None:
        raise InputError("no folder given", hint=f"Say where {data} lies with --folder.")
    yield from load_examples(data, folder, split, count)


def _turn(world: str) -> tuple[str, int]:
    """NAME or NAME:N as a world's name and its scenes a turn.

    Raises:
        InputError: no such world, or no number above 0.
    """
    from sam4mllm_tool.scenes.world import WORLDS

    name, _, scenes = world.partition(":")
    if name not in WORLDS:
        raise InputError(f"no world {name!r}", hint=f"Known: {', '.join(sorted(WORLDS))}.")
    if scenes and not (scenes.isdigit() and int(scenes)):
        raise InputError(f"no number of scenes in {world!r}", hint=f"Write {name}:2, say.")
    return name, int(scenes or 1)


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
