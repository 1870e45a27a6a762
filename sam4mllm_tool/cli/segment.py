"""``sam4mllm-tool segment IMAGE… EXPRESSION``: text to masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from sam4mllm_tool.cli.remote import ServerOption, TokenOption, remote_tools
from sam4mllm_tool.drawing.overlay import overlay
from sam4mllm_tool.errors import DialogueError, InputError, nearest
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.loading import LoadedImage, load_image, read_picture
from sam4mllm_tool.images.sources import expand_sources
from sam4mllm_tool.masks.files import FILE_FORMATS, FileFormat, save_masks
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.pipeline.validation import check_expression
from sam4mllm_tool.types import RgbImage, TargetCount

if TYPE_CHECKING:
    from sam4mllm_integrations.mcp_remote import RemoteTools

DEFAULT_FORMATS = "png,coco_rle,overlay"


def segment(
    context: typer.Context,
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
    server: ServerOption = None,
    token: TokenOption = None,
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

    With --server a running 'sam4mllm-tool mcp' is asked, and no models are loaded here.

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
    remote = remote_tools(context, server, token)
    only = Picture.of(sources[0], policy) if len(sources) == 1 else None
    if remote is None:
        settings = Settings(strategy=strategy, points=points, candidates=candidates)
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
        run = partial(_run_here, model, expression, count)
    else:
        run = partial(_run_there, remote, expression, count, strategy=strategy, points=points)
    ask = partial(_answer, run, files)
    if only is None:
        _segment_many(sources, ask, policy, as_json)
        return
    found = ask(only)
    if as_json:
        print_json(found.document)
    else:
        show_dialogue(found.trace)
        show_outcome(found.trace, found.files)


class Picture(NamedTuple):
    """A picture to segment.

    Attributes:
        source: as the user wrote it.
        data: the encoded file.
        loaded: the same, decoded.
    """

    source: str
    data: bytes
    loaded: LoadedImage

    @classmethod
    def of(cls, source: str, policy: ImagePolicy) -> Picture:
        """Read and decode it.

        Raises:
            ImageError, AccessDenied: see :func:`sam4mllm_tool.load_image`.
        """
        data = read_picture(source, policy)
        return cls(source, data, load_image(data, policy))

    @property
    def name(self) -> str:
        """What documents call it."""
        return "data URI" if self.source.startswith("data:") else Path(self.source).name[:200]


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

    def write(self, trace: Trace, image: RgbImage) -> list[Path]:
        """Write them; returns their paths. No file in the folder is overwritten."""
        written = [] if self.folder is None else self._masks(trace, image, self.folder)
        return written if self.trace is None else [*written, write_trace(trace, image, self.trace)]

    def _masks(self, trace: Trace, image: RgbImage, folder: Path) -> list[Path]:
        source = trace.image["source"]
        return save_masks(
            trace.to_masks(),
            image,
            folder,
            self.kinds,
            self.policy,
            stem=_stem(source),
            file_name=source,
            overlay=overlay(image, trace.objects) if "overlay" in self.kinds else None,
        )


class Answer(NamedTuple):
    """A picture's run, what ``--json`` prints of it, and the files written."""

    trace: Trace
    document: dict[str, Any]
    files: list[Path]


def _run_here(
    model: Sam4MLLM, expression: str, count: TargetCount, picture: Picture
) -> Trace:  # fmt: skip
    image = picture.loaded.image
    return model.segment(image, expression, count=count, source=picture.name).trace


def _run_there(
    remote: RemoteTools, expression: str, count: TargetCount, picture: Picture, **options: Any
) -> Trace:
    trace = remote.segment(picture.data, expression, count=count, **options)
    return trace.model_copy(update={"image": {**trace.image, "source": picture.name}})


def _answer(run: Callable[[Picture], Trace], files: Files, picture: Picture) -> Answer:
    trace = run(picture)
    written = files.write(trace, picture.loaded.image)
    document = {"source": picture.name, **segmentation_document(trace)}
    document["notes"] = [*picture.loaded.notes, *document["notes"]]
    return Answer(trace, {**document, "files": [str(path) for path in written]}, written)


def _segment_many(
    sources: Sequence[str],
    ask: Callable[[Picture], Answer],
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
                found = ask(Picture.of(source, policy))
            except (InputError, DialogueError) as error:
                failures[source[:200]] = str(error)
            else:
                documents.append({**found.document, "source": source[:200]})
                if not as_json:
                    console.print(source[:200], style="bold", markup=False, highlight=False)
                    show_outcome(found.trace, found.files)
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


def write_trace(trace: Trace, image: RgbImage, path: Path) -> Path:
    """The run as a self-contained page, or as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return trace.save(path, image)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}", hint="Choose another file."
        ) from error


def _stem(source: str) -> str:
    """What the files of a picture begin with: its own name, as far as a file name takes it."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(source).stem)
    return kept.encode()[:100].decode(errors="ignore") or "picture"
