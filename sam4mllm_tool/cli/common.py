"""What the commands share: options, error messages, output of results."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sam4mllm_tool import embedded
from sam4mllm_tool.catalogue import FOR_PHOTOGRAPHS, nearest_checkpoint
from sam4mllm_tool.errors import (
    BackendError,
    CheckpointError,
    DialogueError,
    InputError,
    Sam4MllmError,
)
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.pipeline.points import PATTERNS, candidate_points
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.pipeline.strategies import STRATEGIES, get_strategy
from sam4mllm_tool.pipeline.trace import Trace
from sam4mllm_tool.types import Box, TargetCount

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM

console = Console()
_errors = Console(stderr=True)


def not_installed(what: str, extra: str) -> InputError:
    """The refusal of a command whose extra is missing."""
    hint = f'Run: pip install "sam4mllm-tool[{extra}]"'
    return InputError(f"{what} is not installed", hint=hint)


def quiet_libraries() -> None:
    """Keep the libraries' warnings off the console.

    ``python -W …`` and ``TRANSFORMERS_VERBOSITY`` show them again.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


MllmOption = Annotated[
    str,
    typer.Option(
        help="'embedded', a directory or hub id of an image-text-to-text model, or the address of "
        "an OpenAI-compatible server (http://host:8000/v1)."
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Dialogue format; default: the checkpoint's own, a server's: "
                 "generic."),
]  # fmt: skip
AdapterOption = Annotated[str | None, typer.Option(help="PEFT adapter over the MLLM.")]
SamOption = Annotated[
    str,
    typer.Option(
        "--sam",
        help="'embedded', a checkpoint file of segment-anything or EfficientViT-SAM, or a "
        "directory or hub id of a transformers SAM.",
    ),
]
SamDecoderOption = Annotated[
    str | None,
    typer.Option("--sam-decoder", help="File of fine-tuned weights laid over a --sam file's."),
]
SamDtypeOption = Annotated[
    str,
    typer.Option(
        "--sam-dtype",
        help="Of the segmenter's image encoder: auto (float32), float32 or bfloat16.",
    ),
]
ProposerOption = Annotated[
    str,
    typer.Option(
        help="Finds candidates for a phrase: 'mllm' (its own boxes), or a directory or hub id of "
        "SAM 3, Grounding DINO or OWLv2."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


def known_strategy(value: str) -> str:
    """Option callback for the name of a strategy.

    Raises:
        InputError: it is not a built-in one.
    """
    return get_strategy(value).name


def known_strategies(values: list[str]) -> list[str]:
    """Option callback for several; see :func:`known_strategy`."""
    return [known_strategy(value) for value in values]


def known_pattern(value: str) -> str:
    """Option callback for a pattern of candidate points.

    Raises:
        InputError: there is no such pattern.
    """
    candidate_points(value, Box(0, 0, 1, 1), 1)
    return value


StrategyOption = Annotated[
    str,
    typer.Option(callback=known_strategy, help=f"How prompts are asked: {', '.join(STRATEGIES)}."),
]
STRATEGY_HELP = f"How the prompts are asked: {', '.join(STRATEGIES)}."
CandidatesOption = Annotated[
    str,
    typer.Option(
        callback=known_pattern,
        help=f"How these points are spread over the box: {', '.join(PATTERNS)}.",
    ),
]
CountOption = Annotated[
    TargetCount,
    typer.Option(help="How many objects may match: 0+ (it may be none), 1+, or exactly 1."),
]
MaxPixelsOption = Annotated[
    int, typer.Option(min=1, help="Largest picture that is opened, width × height.")
]
MaxBytesOption = Annotated[
    int, typer.Option(min=1, help="Largest file, data URI or download that is opened.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and no more.")]

EMBEDDED_REMARK = (
    "The embedded models know drawn scenes only. For photographs, add: "
    f"{FOR_PHOTOGRAPHS} ('sam4mllm-tool models' lists more)"
)

# 1 is Python's own; scripts can distinguish a wrong call, an unreadable reply and a broken set-up.
EXIT_INPUT, EXIT_DIALOGUE, EXIT_BACKEND = 2, 3, 4
_WEIGHTS = (".pt", ".pth", ".safetensors")


def fail(error: Sam4MllmError) -> int:
    """Print a typed error and return the exit status it stands for."""
    _errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    _errors.print(error.message, markup=False, highlight=False)
    if error.hint:
        _errors.print(f"Hint: {error.hint}", style="yellow", markup=False, highlight=False)
    if isinstance(error, DialogueError):
        _errors.print(f"The model replied: {error.raw_reply!r}", markup=False, highlight=False)
        return EXIT_DIALOGUE
    return EXIT_BACKEND if isinstance(error, BackendError) else EXIT_INPUT


def load_models(
    mllm: str,
    adapter: str | None,
    format: str | None,
    sam: str,
    sam_decoder: str | None,
    device: str,
    *,
    sam_dtype: str = "auto",
    proposer: str = "mllm",
    settings: Settings | None = None,
    quiet: bool = False,
) -> Sam4MLLM:
    """The pipeline of the given options; a spinner on standard error shows that it is loading.

    An empty option counts as left out, which also overrides a setting.

    Raises:
        BackendError: see :meth:`~sam4mllm_tool.Sam4MLLM.from_pretrained`. A missing file is
            reported before the model libraries are imported, which takes seconds.
    """
    places = {"--mllm": mllm, "--adapter": adapter, "--sam": sam, "--sam-decoder": sam_decoder,
              "--proposer": proposer}  # fmt: skip
    for option, place in places.items():
        _check_place(option, place)
    if format:
        get_format(format)
    if mllm == embedded.NAME and not quiet:
        remark(EMBEDDED_REMARK)
    with alive(f"loading {mllm} and {sam} …", quiet=quiet):
        from sam4mllm_tool.pipeline.model import load

        return load(
            mllm,
            adapter=adapter or None,
            format=format or None,
            segmenter=sam,
            proposer=proposer or "mllm",
            device=device,
            settings=settings,
            segmenter_options={"decoder": sam_decoder or None, "dtype": sam_dtype or "auto"},
        )


def _check_place(option: str, place: str | None) -> None:
    """A name that can only be a path must exist; hub ids and addresses are not checked."""
    if not place or "://" in place:
        return
    only_a_path = place.startswith(("/", "./", "../", "~")) or place.endswith(_WEIGHTS)
    if only_a_path and not Path(place).expanduser().exists():
        raise CheckpointError(
            f"{option} {place}: there is no such file or folder",
            hint=f"{nearest_checkpoint(place)}Check the path.",
        )


@contextmanager
def alive(what: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on standard error, where that is a terminal."""
    with nullcontext() if quiet else _errors.status(what):
        yield


@contextmanager
def counted(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar with the time left on standard error; calling what it gives is one step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    # Output appears above the bar; where standard output is a pipe, it goes there.
    above = sys.stdout.isatty()
    with Progress(*columns, console=_errors, disable=quiet, redirect_stdout=above) as bar:
        task = bar.add_task(what, total=total)
        yield lambda _: bar.advance(task)


def remark(text: str) -> None:
    """A line on standard error."""
    _errors.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=1))


def segmentation_document(trace: Trace) -> dict[str, Any]:
    """The ``--json`` document of a query."""
    return {
        "image_size": [trace.image["width"], trace.image["height"]],
        "status": trace.status,
        "expression": trace.expression,
        "objects": [
            {key: one[key] for key in ("box", "score", "area", "points", "mask", "predicted_iou")}
            for one in trace.objects
        ],
        "timings": trace.timings,
        "notes": trace.notes,
    }


def show_dialogue(trace: Trace) -> None:
    """The conversation, and every point with its answer."""
    for turn in trace.conversation():
        style = {"user": "cyan", "assistant": "green"}.get(turn["role"], "dim")
        console.print(f"[{style}]{turn['role']:>9}[/] ", end="")
        console.print(turn["text"].strip(), markup=False, highlight=False)
    for number, one in enumerate(trace.objects, 1):
        if one["points"]:
            console.print(points_table(one["points"], f"object {number}: answers"))


def points_table(points: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Points with label and probabilities, as a trace holds them."""
    table = Table(title=title, title_justify="left")
    for column in ("x", "y", "label", "p_yes", "p_no"):
        table.add_column(column, justify="right" if column != "label" else "left")
    colours = {"foreground": "green", "background": "red"}
    for p in points:
        colour = colours.get(p["label"], "dim")
        table.add_row(
            f"{p['x']:.1f}",
            f"{p['y']:.1f}",
            f"[{colour}]{p['label']}[/]",
            "" if p["p_yes"] is None else f"{p['p_yes']:.3f}",
            "" if p["p_no"] is None else f"{p['p_no']:.3f}",
        )
    return table


def show_outcome(trace: Trace, files: list[Path]) -> None:
    """Status, objects, notes, times and the files written."""
    if not trace.objects:
        console.print(
            "[yellow]not found[/]: according to the model, nothing in the picture matches."
        )
    for number, one in enumerate(trace.objects, 1):
        box = ", ".join(f"{value:.0f}" for value in one["box"])
        console.print(
            f"object {number}: box ({box}), mask {one['area']} pixels, "
            f"predicted IoU {one['predicted_iou']:.2f}",
            highlight=False,
        )
    for note in trace.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in trace.timings.items())
    console.print(f"[dim]{times}[/]", highlight=False)
    for path in files:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def show_failures(failures: Mapping[str, str]) -> None:
    """What went wrong with which picture, on standard error."""
    for name, message in failures.items():
        _errors.print(f"failed: {name}: {message}", style="yellow", markup=False, highlight=False)
