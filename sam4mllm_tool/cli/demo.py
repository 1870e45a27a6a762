"""``sam4mllm-tool demo``: the main job on a picture that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    EMBEDDED_REMARK,
    alive,
    console,
    remark,
    show_dialogue,
    show_outcome,
)
from sam4mllm_tool.cli.segment import DEFAULT_FORMATS, Files, file_formats, write_trace


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo writes.")] = Path(
        "demo-output"
    ),
) -> None:
    """Segment an object in the shipped picture and show the whole dialogue."""
    from sam4mllm_tool import embedded
    from sam4mllm_tool.images.access import ImagePolicy
    from sam4mllm_tool.images.loading import load_image
    from sam4mllm_tool.pipeline.model import load

    question = json.loads((embedded.DEMO / "demo.json").read_text(encoding="utf-8"))
    picture = load_image(embedded.DEMO / question["picture"]).image
    expression = question["expression"]
    console.print(f"Segmenting [bold]{expression!r}[/] in {question['picture']} …")
    with alive("loading the embedded models …"):
        model = load()
    found = model.segment(picture, expression, source=question["picture"]).trace
    files = Files(out, file_formats(DEFAULT_FORMATS), None, ImagePolicy(output_dirs=None))
    written = files.write(found, picture)
    written += [write_trace(found, picture, out / name) for name in ("trace.html", "trace.json")]
    show_dialogue(found)
    show_outcome(found, [path.resolve() for path in written])
    remark(EMBEDDED_REMARK)
