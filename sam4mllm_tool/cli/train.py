"""``sam4mllm-tool dialogues`` and ``train``: referring data as conversations, and LoRA on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sam4mllm_tool.cli.common import DeviceOption, console
from sam4mllm_tool.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL import Image

    from sam4mllm_tool.training.dialogues import Conversation, Recipe
    from sam4mllm_tool.training.mixture import Source
    from sam4mllm_tool.training.recipe import LoraRecipe, Preset

DataOption = Annotated[
    list[str],
    typer.Option(
        help="'scenes', or NAME=PATH[:SHARE], repeatable: refcoco=DIR, grefcoco=DIR:0.5, "
        "vqa=FILE:0.2, … SHARE is how much of the set's conversations an epoch holds."
    ),
]
WorldOption = Annotated[
    list[str],
    typer.Option(
        help="World of scenes, repeatable; COUNT scenes of each, or N times as many with NAME:N."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split to learn from.")]
CountOption = Annotated[
    int | None, typer.Option(min=1, help="Scenes per world (2000), or records per set (all).")
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="published, ours or small (by default small for the embedded model and "
                 "scenes, else published); other options override its values."),
]  # fmt: skip
PpgOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of references asked with PPG.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--sam", help="Segmenter that judges PPG's points and draws the held-out masks: "
                 "'embedded', a checkpoint or a family; only --preset small has a default."),
]  # fmt: skip
ReferencesOption = Annotated[
    int | None, typer.Option(min=1, help="Most references per conversation.")
]
PointsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Most points per round-2 question; all numbers are equally likely."),
]
GridsOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of round-2 questions about an even grid.")
]
JitterOption = Annotated[
    float | None,
    typer.Option(min=0, max=0.5, help="Largest move of round 2's box edges, as a share of a side."),
]
HardPointsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of round 2's points off the object that are moved onto other objects.",
    ),
]
SharedBoxesOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of round-2 boxes that hold an overlapping object too; "
                 "its expressions get the same box and points."),
]  # fmt: skip
VqaShareOption = Annotated[
    float | None,
    typer.Option(min=0, max=0.9, help="Share of scenes that ask what lies at a place."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=PATH of data sets whose val and test pictures are left out too; those of the "
        "training sets always are."
    ),
]
SMALL = "small"
# In scenes only absent things have the count "0+"; a model would learn that "0+" means absent. With
# half of the other expressions asked with "0+", it refused a quarter of the compound expressions.
LOOSENED = 0.85


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

    sources = _sources(data)
    chosen = _preset(preset or _fitting("embedded", sources))
    recipe = _dialogues(
        chosen, sources, seed, ppg, references, vqa_share,
        _candidates(points, grids, jitter, hard_points, shared_boxes),
    )  # fmt: skip
    judge = load_segmenter(_judge(chosen, sam)) if recipe.ppg_share else None
    scenes = SceneDraw(world, count or 20)
    left_out = _excluded(sources, exclude, split)
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


def train(
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter.")] = None,
    base: Annotated[str, typer.Option(help="'embedded', or directory of the base.")] = "embedded",
    data: DataOption = ["scenes"],  # noqa: B006
    world: WorldOption = [SMALL],  # noqa: B006
    split: SplitOption = "train",
    count: CountOption = None,
    preset: PresetOption = None,
    show_recipe: Annotated[
        bool, typer.Option(help="Print every value with its source, and stop.")
    ] = False,
    epochs: Annotated[float | None, typer.Option()] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Conversations per step and device.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Steps whose gradients are summed.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1)] = None,
    alpha: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Default: the preset's, whatever the rank; with small, twice the rank.",
        ),
    ] = None,
    projector: Annotated[str | None, typer.Option(help="lora, full or frozen.")] = None,
    vision: Annotated[bool, typer.Option(help="LoRA layers in the vision tower too.")] = False,
    smoothing: Annotated[
        float | None, typer.Option(min=0, help="Of coordinates, in steps of 0-999; 0: none.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw_torch, adamw_bnb_8bit, …")] = None,
    bf16: Annotated[bool | None, typer.Option()] = None,
    ppg: PpgOption = None,
    references: ReferencesOption = None,
    points: PointsOption = None,
    grids: GridsOption = None,
    jitter: JitterOption = None,
    hard_points: HardPointsOption = None,
    shared_boxes: SharedBoxesOption = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Most tokens of text per conversation.")
    ] = None,
    vqa_share: VqaShareOption = None,
    exclude: ExcludeOption = None,
    held_out: Annotated[
        int, typer.Option(min=0, help="Scenes or records to evaluate the model on while training.")
    ] = 0,
    held_out_split: Annotated[str, typer.Option(help="Their split.")] = "val",
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    deepspeed: Annotated[
        str | None, typer.Option(help="zero2, zero3, or a DeepSpeed configuration.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write OUT/tensorboard.")] = False,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="An adapter of the same rank to continue from.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last whole checkpoint.")] = False,
    sam: JudgeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a LoRA adapter on referring dialogues."""
    sources = _sources(data)
    preset = preset or _fitting(base, sources)
    chosen = _preset(preset)
    how = _dialogues(
        chosen, sources, seed, ppg, references, vqa_share,
        _candidates(points, grids, jitter, hard_points, shared_boxes),
    )  # fmt: skip
    learning = _learning(
        chosen, seed=seed, vision=vision, epochs=epochs, rate=rate, batch=batch,
        accumulate=accumulate, rank=rank, alpha=alpha, projector=projector, smoothing=smoothing,
        optimizer=optimizer, bf16=bf16, longest=tokens,
    )  # fmt: skip
    if show_recipe:
        _show_recipe(preset, chosen, learning, how)
        return
    if out is None:
        raise InputError("no folder for the adapter", hint="Name it with --out.")

    from sam4mllm_tool import embedded
    from sam4mllm_tool.evaluation.cases import asked_with, cases_of
    from sam4mllm_tool.segmenter import load_segmenter
    from sam4mllm_tool.training.dialogues import Conversations, chunks
    from sam4mllm_tool.training.lora import deepspeed_file
    from sam4mllm_tool.training.lora import train as run
    from sam4mllm_tool.training.mixture import SceneDraw, mixture
    from sam4mllm_tool.training.mixture import held_out as draw_held_out
    from sam4mllm_tool.training.progress import HeldOut

    judge = load_segmenter(_judge(chosen, sam)) if how.ppg_share or held_out else None
    scenes = SceneDraw(world, count)
    about = mixture(sources, how, split, scenes, _excluded(sources, exclude, split), limit=count)
    learnt = Conversations(about, how, judge if how.ppg_share else None)
    asked = draw_held_out(sources, held_out_split, scenes, seed, held_out) if held_out else []
    cases = list(asked_with(lambda: cases_of(asked), how.count)())
    console.print(f"{len(learnt)} conversations", highlight=False)
    run(
        str(embedded.MLLM) if base == embedded.NAME else base,
        learnt,
        out,
        learning,
        how,
        device=device,
        resume=resume,
        save_steps=save_steps,
        held_out=Conversations(chunks(asked, how), how),
        examined=HeldOut(cases, judge) if asked and judge else None,
        start=start,
        deepspeed=deepspeed_file(deepspeed) if deepspeed else None,
        tensorboard=tensorboard,
        show_progress=True,
    )
    console.print(f"wrote the adapter to {out}", markup=False, highlight=False, soft_wrap=True)


def _fitting(base: str, sources: Sequence[Source]) -> str:
    """The preset where none is named: ``small`` is for the embedded model and scenes alone."""
    scenes = all(source.path is None for source in sources)
    return SMALL if base == "embedded" and scenes else "published"


def _preset(name: str) -> Preset:
    from sam4mllm_tool.training.recipe import PRESETS

    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}", hint=nearest(name, PRESETS, "Presets"))
    return PRESETS[name]


def _sources(data: Sequence[str]) -> list[Source]:
    from sam4mllm_tool.training.mixture import Source

    return [Source.parse(text) for text in data]


def _learning(preset: Preset, **asked: Any) -> LoraRecipe:
    """The preset's learning with what was asked for instead."""
    changes = {name: value for name, value in asked.items() if value is not None}
    if changes.get("projector", "lora") not in ("lora", "full", "frozen"):
        raise InputError(
            f"no way to train a projector: {changes['projector']!r}", hint="lora, full or frozen."
        )
    if preset.alpha_per_rank and "rank" in changes:
        changes.setdefault("alpha", round(preset.alpha_per_rank * changes["rank"]))
    return replace(preset.learning, **changes)


def _candidates(
    points: int | None,
    grids: float | None,
    jitter: float | None,
    hard_points: float | None,
    shared_boxes: float | None,
) -> dict[str, Any]:
    """The changes asked for of round 2's questions."""
    asked = {"grids": grids, "jitter": jitter, "hard_points": hard_points,
             "shared_boxes": shared_boxes}  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return changes | ({"asked": (1, points), "normal": None} if points else {})


def _dialogues(
    preset: Preset,
    sources: Sequence[Source],
    seed: int,
    ppg: float | None,
    references: int | None,
    vqa_share: float | None,
    candidates: dict[str, Any],
) -> Recipe:
    """The preset's conversations with what was asked for instead."""
    kept = preset.dialogues
    scenes = any(source.path is None for source in sources)
    return replace(
        kept,
        seed=seed,
        ppg_share=kept.ppg_share if ppg is None else ppg,
        references=references or kept.references,
        vqa_share=kept.vqa_share if vqa_share is None else vqa_share,
        candidates=replace(kept.candidates, **candidates),
        loosened=LOOSENED if scenes and kept.count is None else kept.loosened,
    )


def _judge(preset: Preset, named: str | None) -> str:
    """The segmenter that was named; never the embedded one by accident."""
    if not (named or preset.judge):
        raise InputError(
            "no segmenter named to judge points and draw masks with",
            hint="Name it with --sam: a SAM checkpoint or family, or 'embedded'.",
        )
    return named or preset.judge


def _excluded(sources: list[Source], others: list[str] | None, split: str) -> frozenset[str]:
    from sam4mllm_tool.training.mixture import excluded_pictures

    if split != "train":
        return frozenset()
    return excluded_pictures(
        sources, _sources(others or []), lambda text: console.print(f"[yellow]{text}[/]")
    )


def _show_recipe(name: str, preset: Preset, learning: LoraRecipe, how: Recipe) -> None:
    from sam4mllm_tool.training.recipe import recipe_rows

    table = Table(title=f"preset {name}", title_justify="left")
    for column in ("value", "is", "source"):
        table.add_column(column, overflow="fold")
    for row in recipe_rows(preset, learning, how):
        table.add_row(*("none" if cell is None else str(cell) for cell in row))
    console.print(table)


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
