"""``sam4mllm-tool models``: which checkpoints go together, and what they cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from sam4mllm_tool.catalogue import Combination, combinations
from sam4mllm_tool.cli.common import JsonOption, console, print_json


def models(as_json: JsonOption = False) -> None:
    """List known combinations of MLLM and segmenter: memory, licences, downloads, commands."""
    known = combinations()
    if as_json:
        print_json([_document(one) for one in known])
        return
    console.print(_table(known))
    console.print(
        "Memory is computed: parameters × bytes (MLLM bfloat16, segmenter float32), for the weights"
        " alone. Caches and activations come on top.",
        style="dim",
        highlight=False,
    )
    for one in known:
        console.print(f"\n{one.name}: {one.notes}", markup=False, highlight=False, soft_wrap=True)
        for command in one.commands:
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _table(known: tuple[Combination, ...]) -> Table:
    table = Table(title="known combinations", title_justify="left", show_lines=True)
    for column in ("combination", "checkpoints and licences", "memory", "download", "run by us"):
        table.add_column(column, overflow="fold")
    for one in known:
        parts = "\n".join(f"{part.name}: {part.licence}" for part in one.parts)
        run = "[green]yes[/]" if one.run else "no"
        download = _bytes(one.download)
        if one.unsized:
            download += f" and {one.unsized} files of unknown size"
        table.add_row(one.name, parts, _bytes(one.memory), download, run)
    return table


def _document(one: Combination) -> dict[str, Any]:
    sizes = {
        "memory_bytes": one.memory,
        "download_bytes": one.download,
        "downloads_of_unknown_size": one.unsized,
    }
    return {**asdict(one), **sizes}


def _bytes(size: int) -> str:
    if not size:
        return "none"
    return f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.0f} MB"
