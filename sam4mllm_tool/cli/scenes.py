"""``sam4mllm-tool scenes``: synthetic referring scenes with exact masks, in published layouts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import console


class SceneFormat(StrEnum):
    """On-disk layouts."""

    PLAIN = "plain"
    COCO = "coco"
    REFCOCO = "refcoco"
    GREFCOCO = "grefcoco"
    REASONSEG = "reasonseg"


class SceneWorld(StrEnum):
    """Which things appear: everything, or what the embedded MLLM or SAM was taught."""

    FULL = "full"
    SMALL = "small"
    SAM = "sam"
    HELD_OUT = "held_out"


def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Other seeds give other scenes.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 12,
    split: Annotated[str, typer.Option(help="train, val or test; they never share scenes.")] = (
        "val"
    ),
    format: Annotated[SceneFormat, typer.Option(help="On-disk layout.")] = SceneFormat.PLAIN,
    world: Annotated[SceneWorld, typer.Option(help="Which things appear.")] = SceneWorld.FULL,
    sheet: Annotated[bool, typer.Option(help="Also write a contact sheet.")] = False,
) -> None:
    """Write pictures with annotations, and a contact sheet to look at."""
    from sam4mllm_tool.scenes import world as worlds
    from sam4mllm_tool.scenes.export import export_scenes

    chosen = getattr(worlds, f"{world.name}_WORLD")
    with console.status(f"rendering {count} scenes …"):
        export_scenes(out, seed, count, split, format.value, sheet, chosen)
    console.print(f"wrote {count} scenes to {out.resolve()}", highlight=False, soft_wrap=True)
