"""``sam4mllm-tool demo``: the main job on a picture that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import console, show_dialogue, show_outcome
from sam4mllm_tool.cli.segment import write_files, write_trace


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo writes.")] = Path(
        "demo-output"
    ),
) -> None:
    """Segment an object in the shipped picture and show the whole dialogue."""
    from sam4mllm_tool import embedded
    from sam4mllm_tool.images.loading import load_image
    from sam4mllm_tool.pipeline.model import load

    question = json.loads((embedded.DEMO / "demo.json").read_text(encoding="utf-8"))
    picture = load_image(embedded.DEMO / question["picture"]).image
    expression = question["expression"]
    console.print(f"Segmenting [bold]{expression!r}[/] in {question['picture']} …")
    found = load().segment(picture, expression, source=question["picture"])
    files = write_files(found, picture, out)
    files += [write_trace(found, picture, out / name) for name in ("trace.html", "trace.json")]
    show_dialogue(found)
    show_outcome(found, [path.resolve() for path in files])
