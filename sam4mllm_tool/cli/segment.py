"""``sam4mllm-tool segment IMAGE EXPRESSION``: text to masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam4mllm_tool.cli.common import (
    STRATEGY_HELP,
    AdapterOption,
    CandidatesOption,
    CountOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MllmOption,
    SamDecoderOption,
    SamOption,
    known_strategy,
    print_json,
    segmentation_document,
    show_dialogue,
    show_outcome,
)
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.results import Segmentation, Settings
from sam4mllm_tool.types import RgbImage, TargetCount


def segment(
    image: Annotated[str, typer.Argument(help="Path, data URI, or URL with --network.")],
    expression: Annotated[str, typer.Argument(help="What to segment.")],
    count: CountOption = TargetCount.ZERO_OR_MORE,
    strategy: Annotated[str, typer.Option(callback=known_strategy, help=STRATEGY_HELP)] = "pqpp",
    points: Annotated[int, typer.Option(min=1, max=100, help="Points to ask about.")] = (
        Settings().points
    ),
    candidates: CandidatesOption = "grid",
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for masks and overlay.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the run to FILE.html (or FILE.json).")
    ] = None,
    network: Annotated[bool, typer.Option(help="Allow http(s) URLs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment what EXPRESSION describes in IMAGE."""
    from sam4mllm_tool.images.access import ImagePolicy
    from sam4mllm_tool.images.loading import load_image
    from sam4mllm_tool.pipeline.model import load

    if trace is not None and trace.suffix not in {".html", ".json"}:
        raise InputError(
            f"--trace {trace} is neither .html nor .json", hint="Name a file that ends in .html."
        )
    loaded = load_image(image, ImagePolicy(allow_network=network))
    settings = Settings(strategy=strategy, points=points, candidates=candidates, budget=points)
    model = load(
        mllm,
        adapter=adapter,
        format=format,
        segmenter=sam,
        device=device,
        settings=settings,
        segmenter_options={"decoder": sam_decoder},
    )
    found = model.segment(loaded.image, expression, count=count, source=Path(image).name[:200])
    files = write_files(found, loaded.image, out) if out else []
    files += [write_trace(found, loaded.image, trace)] if trace else []
    if as_json:
        document: dict[str, Any] = segmentation_document(found)
        document["notes"] = [*loaded.notes, *document["notes"]]
        document["files"] = [str(path) for path in files]
        print_json(document)
        return
    show_dialogue(found)
    show_outcome(found, files)


def write_files(found: Segmentation, image: RgbImage, folder: Path) -> list[Path]:
    """One mask PNG an object, and an overlay."""
    from sam4mllm_tool.drawing.overlay import overlay

    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for number, one in enumerate(found.objects, 1):
            files.append(folder / f"mask_{number}.png")
            one.mask.to_pil().save(files[-1])
        files.append(folder / "overlay.png")
        overlay(image, found.trace.objects).save(files[-1])
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}", hint="Choose another folder."
        ) from error
    return files


def write_trace(found: Segmentation, image: RgbImage, path: Path) -> Path:
    """The run as a self-contained page, or as JSON."""
    from sam4mllm_tool.drawing.html import trace_page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            return found.trace.save(path)
        path.write_text(trace_page(found.trace.page_data(), image), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", hint="Choose another file."
        ) from error
    return path
