"""``sam4mllm-tool segment IMAGE… EXPRESSION``: text to masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from sam4mllm_tool.cli.common import (
    EXIT_INPUT,
    AdapterOption,
    CandidatesOption,
    CountOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    ProposerOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    StrategyOption,
    console,
    counted,
    load_models,
    print_json,
    segmentation_document,
    show_dialogue,
    show_failures,
    show_outcome,
)
from sam4mllm_tool.errors import DialogueError, InputError, nearest
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import LoadedImage, load_image
from sam4mllm_tool.images.sources import expand_sources
from sam4mllm_tool.masks.files import FILE_FORMATS, FileFormat, save_masks
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Segmentation, Settings
from sam4mllm_tool.pipeline.validation import check_expression
from sam4mllm_tool.types import TargetCount

DEFAULT_FORMATS = "png,coco_rle,overlay"


def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures: paths, folders, patterns such as 'photos/*.jpg', data URIs, or URLs "
            "with --network."
        ),
    ],
    expression: Annotated[str, typer.Argument(help="What to segment.")],
    count: CountOption = TargetCount.ZERO_OR_MORE,
    strategy: StrategyOption = "pqpp",
    points: Annotated[int, typer.Option(min=1, max=100, help="Points to ask about.")] = (
        Settings().points
    ),
    candidates: CandidatesOption = "grid",
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    proposer: ProposerOption = "mllm",
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for masks and overlay.")] = None,
    formats: Annotated[
        str, typer.Option(help=f"What --out gets, separated by commas: {', '.join(FILE_FORMATS)}.")
    ] = DEFAULT_FORMATS,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write the run to FILE.html (or FILE.json); of one picture only."),
    ] = None,
    network: Annotated[bool, typer.Option(help="Allow http(s) URLs.")] = False,
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    as_json: JsonOption = False,
) -> None:
    """Segment what EXPRESSION describes in one picture or many.

    Of several pictures, --json prints {"pictures": [...], "failures": {...}}; one that cannot be
    read stops nothing.
    """
    check_expression(expression)
    sources = expand_sources(images)
    if trace is not None:
        check_trace(trace, len(sources))
    policy = ImagePolicy(
        output_dirs=None, allow_network=network, max_pixels=max_pixels, max_bytes=max_bytes
    )
    files = Files(out, file_formats(formats), trace, policy)
    only = load_image(sources[0], policy) if len(sources) == 1 else None
    settings = Settings(strategy=strategy, points=points, candidates=candidates, budget=points)
    model = load_models(
        mllm,
        adapter,
        format,
        sam,
        sam_decoder,
        device,
        sam_dtype=sam_dtype,
        proposer=proposer,
        settings=settings,
        quiet=as_json,
    )
    ask = partial(_segment, model, expression, count, files)
    if only is None:
        _segment_many(sources, ask, policy, as_json)
        return
    found = ask(sources[0], only)
    if as_json:
        print_json(found.document)
    else:
        show_dialogue(found.result)
        show_outcome(found.result, found.files)


@dataclass(frozen=True)
class Files:
    """What is written about a picture.

    Attributes:
        folder: for masks and overlay, or ``None``.
        kinds: what the folder gets.
        trace: file for the run, or ``None``.
        policy: of the pictures; any folder may be written to.
    """

    folder: Path | None
    kinds: Sequence[FileFormat]
    trace: Path | None
    policy: ImagePolicy

    def write(self, found: Segmentation) -> list[Path]:
        """Write them; returns their paths. No file in the folder is overwritten."""
        written = [] if self.folder is None else self._masks(found, self.folder)
        return written if self.trace is None else [*written, write_trace(found, self.trace)]

    def _masks(self, found: Segmentation, folder: Path) -> list[Path]:
        source = found.trace.image["source"]
        return save_masks(
            found.to_masks(),
            found.image,
            folder,
            self.kinds,
            self.policy,
            stem=_stem(source),
            file_name=source,
            overlay=found.to_pil() if "overlay" in self.kinds else None,
        )


class Answer(NamedTuple):
    """A picture's result, what ``--json`` prints of it, and the files written."""

    result: Segmentation
    document: dict[str, Any]
    files: list[Path]


def _segment(
    model: Sam4MLLM,
    expression: str,
    count: TargetCount,
    files: Files,
    source: str,
    picture: LoadedImage,
) -> Answer:
    name = "data URI" if source.startswith("data:") else Path(source).name[:200]
    found = model.segment(picture.image, expression, count=count, source=name)
    written = files.write(found)
    document = {"source": name, **segmentation_document(found)}
    document["notes"] = [*picture.notes, *document["notes"]]
    return Answer(found, {**document, "files": [str(path) for path in written]}, written)


def _segment_many(
    sources: Sequence[str],
    ask: Callable[[str, LoadedImage], Answer],
    policy: ImagePolicy,
    as_json: bool,
) -> None:
    """Each picture by itself: one that fails is listed and stops nothing.

    Raises:
        BackendError: a model failed in a way that the next picture would not change.
    """
    documents: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    with counted("pictures", len(sources), quiet=as_json) as advance:
        for source in sources:
            try:
                found = ask(source, load_image(source, policy))
            except (InputError, DialogueError) as error:
                failures[source[:200]] = str(error)
            else:
                documents.append({**found.document, "source": source[:200]})
                if not as_json:
                    console.print(source[:200], style="bold", markup=False, highlight=False)
                    show_outcome(found.result, found.files)
            advance(source)
    if as_json:
        print_json({"pictures": documents, "failures": failures})
    else:
        show_failures(failures)
    if failures:
        raise typer.Exit(EXIT_INPUT)


def file_formats(text: str) -> list[FileFormat]:
    """The formats in a list separated by commas.

    Raises:
        InputError: one that is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {kind: kind for kind in FILE_FORMATS}
    for name in names:
        if name not in known:
            raise InputError(
                f"there is no format {name[:60]!r}", hint=nearest(name, FILE_FORMATS, "Formats")
            )
    return [known[name] for name in names]  # type: ignore[index]


def check_trace(path: Path, pictures: int) -> None:
    """Whether a trace can be written there.

    Raises:
        InputError: another extension, or more than one picture.
    """
    if path.suffix not in {".html", ".json"}:
        raise InputError(
            f"--trace {path} is neither .html nor .json", hint="Name a file that ends in .html."
        )
    if pictures != 1:
        raise InputError(
            f"--trace is of one picture, and there are {pictures}", hint="Name one picture."
        )


def write_trace(found: Segmentation, path: Path) -> Path:
    """The run as a self-contained page, or as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return found.trace.save(path, found.image)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", hint="Choose another file."
        ) from error


def _stem(source: str) -> str:
    """What the files of a picture begin with: its own name, as far as a file name takes it."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(source).stem)
    return kept.encode()[:100].decode(errors="ignore") or "picture"
