"""``sam4mllm-tool annotate FOLDER --expressions FILE``: pictures → COCO JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
    counted,
    load_models,
    print_json,
    show_failures,
)
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.types import TargetCount


def annotate(
    folder: Annotated[Path, typer.Argument(help="Folder with pictures, searched through.")],
    expressions: Annotated[
        Path,
        typer.Option(help=".txt: one expression per line, for every picture; .json: a list, or "
                     "{picture: [expressions]}."),
    ],
    out: Annotated[Path, typer.Option(help="COCO JSON to write; its journal is beside it.")] = (
        Path("annotations.json")
    ),
    count: Annotated[TargetCount, typer.Option(help="How many objects an expression may mean.")] = (
        TargetCount.ZERO_OR_MORE
    ),
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    device: DeviceOption = "auto",
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Annotate a folder of pictures; run it again to continue after a stop."""
    from sam4mllm_tool.annotate import annotate as run
    from sam4mllm_tool.annotate import plan, read_expressions

    texts = read_expressions(expressions)
    total = len(plan(folder, texts))
    policy = ImagePolicy(max_pixels=max_pixels, max_bytes=max_bytes)
    model = load_models(
        mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype, quiet=as_json
    )
    with counted("pictures", total, quiet=as_json) as advance:
        done = run(model, folder, texts, out, count=count, policy=policy, on_picture=advance)
    number = len(done.document["annotations"])
    if as_json:
        print_json({"pictures": total, "done_before": done.done_before, "annotations": number,
                    "failures": done.failures, "file": str(out)})  # fmt: skip
        return
    show_failures(done.failures)
    console.print(
        f"{number} objects in {total} pictures ({done.done_before} done before), "
        f"{len(done.failures)} failures; wrote {out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
