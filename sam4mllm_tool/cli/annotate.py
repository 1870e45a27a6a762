"""``sam4mllm-tool annotate PICTURES --expressions FILE``: pictures → COCO JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from sam4mllm_tool.cli.engines import (
    AddressOption,
    CpusOption,
    Engine,
    EngineOption,
    GpusOption,
    WorkersOption,
    pool,
)
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.types import TargetCount

if TYPE_CHECKING:
    from sam4mllm_tool.annotate import Annotated as Annotation
    from sam4mllm_tool.annotate import Engine as AnnotationEngine
    from sam4mllm_tool.pipeline.model import Sam4MLLM


def annotate(
    pictures: Annotated[
        str,
        typer.Argument(help="Folder with pictures, searched through; a URL of one (s3://…); or a "
                       ".jsonl or .parquet file of rows with picture and expressions."),
    ],
    expressions: Annotated[
        Path | None,
        typer.Option(help=".txt: one expression per line, for every picture; .json: a list, or "
                     "{picture: [expressions]}. Not needed where PICTURES is a list with them."),
    ] = None,
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
    engine: EngineOption = Engine.LOCAL,
    workers: WorkersOption = 1,
    cpus: CpusOption = 1,
    gpus: GpusOption = 0,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Annotate pictures; run it again to continue after a stop."""
    from sam4mllm_tool.annotate import annotate as run
    from sam4mllm_tool.annotate import plan, read_expressions

    texts = read_expressions(expressions) if expressions else None
    total = len(plan(pictures, texts))
    policy = ImagePolicy(max_pixels=max_pixels, max_bytes=max_bytes)
    load = partial(
        load_models, mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype,
        quiet=as_json or engine is Engine.RAY,
    )  # fmt: skip

    def annotated(model: Sam4MLLM | AnnotationEngine) -> Annotation:
        with counted("pictures", total, quiet=as_json) as advance:
            return run(model, pictures, texts, out, count=count, policy=policy, on_picture=advance)

    if engine is Engine.RAY:
        with pool(load, workers, cpus, gpus, address) as others:
            from sam4mllm_tool.cluster.batches import RayAnnotation

            done = annotated(RayAnnotation(others))
    else:
        done = annotated(load())
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
