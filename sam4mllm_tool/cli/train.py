"""``sam4mllm-tool train``: LoRA on referring dialogues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sam4mllm_tool.cli.common import DeviceOption, console
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
    learning_of,
    preset_named,
    sources_of,
)
from sam4mllm_tool.errors import InputError

if TYPE_CHECKING:
    from sam4mllm_tool.training.dialogues import Recipe
    from sam4mllm_tool.training.recipe import LoraRecipe, Preset


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
    sources = sources_of(data)
    preset = preset or fitting_preset(base, sources)
    chosen = preset_named(preset)
    how = dialogues_of(
        chosen, sources, seed, ppg, references, vqa_share,
        candidate_changes(points, grids, jitter, hard_points, shared_boxes),
    )  # fmt: skip
    learning = learning_of(
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

    judge = load_segmenter(judge_of(chosen, sam)) if how.ppg_share or held_out else None
    scenes = SceneDraw(world, count)
    about = mixture(sources, how, split, scenes, excluded_ids(sources, exclude, split), limit=count)
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


def _show_recipe(name: str, preset: Preset, learning: LoraRecipe, how: Recipe) -> None:
    from sam4mllm_tool.training.recipe import recipe_rows

    table = Table(title=f"preset {name}", title_justify="left")
    for column in ("value", "is", "source"):
        table.add_column(column, overflow="fold")
    for row in recipe_rows(preset, learning, how):
        table.add_row(*("none" if cell is None else str(cell) for cell in row))
    console.print(table)
