"""``sam4mllm-tool convert-adapter``: published SAM4MLLM adapters → transformers' LLaVA-NeXT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import console


def convert_adapter(
    source: Annotated[Path, typer.Argument(help="Adapter saved over the original code base.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base, noted in the adapter.")
    ] = None,
) -> None:
    """Rename a published adapter's tensors so that it loads over transformers' own model.

    The dialogue it was trained in is written beside it (chat_template.jinja).
    """
    from sam4mllm_tool.training.convert_adapter import convert_adapter as convert

    written = convert(source, out, base_model=base)
    console.print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)
