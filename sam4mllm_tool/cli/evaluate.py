"""``sam4mllm-tool eval …``: measurements through the same code that users run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.table import Table

from sam4mllm_tool.cli.common import DeviceOption, JsonOption, SamOption, console, print_json

app = typer.Typer(help="Measure models on held-out scenes and benchmarks.", no_args_is_help=True)


@app.command("sam")
def sam_command(
    seed: Annotated[int, typer.Option(help="Seed of the held-out scenes.")] = 0,
    objects: Annotated[int, typer.Option(min=1, help="Objects a world, at least.")] = 500,
    sam: SamOption = "embedded",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Mask quality of the segmenter alone, by number and kind of prompts."""
    from sam4mllm_tool.evaluation.sam import evaluate_sam
    from sam4mllm_tool.load import load_sam

    with nullcontext() if as_json else console.status("measuring …"):
        report = evaluate_sam(load_sam(sam, device=device), seed=seed, objects=objects).to_json()
    if as_json:
        print_json(report)
        return
    for world in ("trained_categories", "held_out_categories"):
        subsets = list(report[world])
        table = Table(title=f"mIoU, {world.replace('_', ' ')}", title_justify="left")
        for column in ("condition", *subsets):
            table.add_column(column, justify="left" if column == "condition" else "right")
        for condition in report[world]["all"]:
            cells = [report[world][subset].get(condition) for subset in subsets]
            table.add_row(condition, *("" if c is None else f"{c['mean']:.3f}" for c in cells))
        console.print(table)
    console.print(f"encode {report['encode_ms']:.0f} ms, decode {report['decode_ms']:.1f} ms")
