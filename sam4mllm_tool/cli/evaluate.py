"""``sam4mllm-tool eval …``: measurements through the same code that users run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.table import Table

from sam4mllm_tool.cli.common import (
    STRATEGY_HELP,
    AdapterOption,
    CandidatesOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MllmOption,
    ProposerOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
    counted,
    known_strategies,
    load_models,
    print_json,
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
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.types import TargetCount

if TYPE_CHECKING:
    from sam4mllm_tool.evaluation.benchmark import Engine as EvaluationEngine
    from sam4mllm_tool.pipeline.model import Sam4MLLM
    from sam4mllm_tool.scenes.world import World

app = typer.Typer(help="Measure models on held-out scenes and benchmarks.", no_args_is_help=True)


@app.command("sam")
def sam_command(
    seed: Annotated[int, typer.Option(help="Seed of the held-out scenes.")] = 0,
    objects: Annotated[int, typer.Option(min=1, help="Objects per world, at least.")] = 500,
    world: Annotated[
        str, typer.Option(help="sam; or crowded: smaller, more numerous, more hidden objects.")
    ] = "sam",
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Mask quality of the segmenter alone, by number and kind of prompts."""
    from sam4mllm_tool.evaluation.sam import evaluate_sam
    from sam4mllm_tool.segmenter import load_segmenter

    drawn = _world(world)
    segmenter = load_segmenter(sam, decoder=sam_decoder, dtype=sam_dtype, device=device)
    with nullcontext() if as_json else console.status("measuring …"):
        report = evaluate_sam(segmenter, seed=seed, objects=objects, world=drawn).to_json()
    if as_json:
        print_json(report)
        return
    for world in ("trained_categories", "held_out_categories"):
        subsets = list(report[world])
        table = Table(title=f"mIoU, {world.replace('_', ' ')}", title_justify="left")
        for column in ("condition", *subsets):
            table.add_column(column, justify="left" if column == "condition" else "right")
        for condition in report[world]["all"]:
            cells = [report[world][subset].get(condition) for subset in subsets]
            table.add_row(condition, *("" if c is None else f"{c['mean']:.3f}" for c in cells))
        console.print(table)
    console.print(f"encode {report['encode_ms']:.0f} ms, decode {report['decode_ms']:.1f} ms")


_POINTS = Settings().points
StrategyOption = Annotated[
    list[str],
    typer.Option(
        callback=known_strategies,
        help=f"{STRATEGY_HELP} Repeatable: several are compared on the same expressions.",
    ),
]
PointsOption = Annotated[int, typer.Option(min=1, max=100, help="Points to ask about per box.")]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Size of a sample of expressions, from as many pictures as possible."),
]
SampleSeedOption = Annotated[int, typer.Option(help="Seed of the sample.")]
UnreadableOption = Annotated[
    int, typer.Option(min=0, help="More pictures than this that cannot be read end the run.")
]
_UNREADABLE = 20
ProtocolOption = Annotated[str, typer.Option(help="ours, lisa, rela or refer: whose evaluation.")]
RuleOption = Annotated[
    list[str], typer.Option(help="Change one rule of the protocol: flag=exact, size=480, …")
]
ShardOption = Annotated[
    str | None,
    typer.Option(help="I/N: this process's share; all shards use one --out. Under accelerate "
                 "launch it is detected automatically."),
]  # fmt: skip


@app.command("scenes")
def scenes_command(
    seed: Annotated[int, typer.Option(help="Seed of the unseen scenes.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Expressions.")] = 500,
    per_kind: Annotated[
        int | None, typer.Option(min=1, help="Take this many of each kind instead; some are rare.")
    ] = None,
    strategy: StrategyOption = ["pqpp"],  # noqa: B006
    points: PointsOption = _POINTS,
    candidates: CandidatesOption = "grid",
    world: Annotated[str, typer.Option(help="small, full, …")] = "small",
    wording: Annotated[
        str, typer.Option(help="train, or held-out: sentences that training never used.")
    ] = "train",
    ask: Annotated[
        str, typer.Option(help="Count in the questions: 0+ as the tools ask, 1+, 1, or true.")
    ] = "0+",
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    proposer: ProposerOption = "mllm",
    device: DeviceOption = "auto",
    engine: EngineOption = Engine.LOCAL,
    workers: WorkersOption = 1,
    cpus: CpusOption = 1,
    gpus: GpusOption = 0,
    address: AddressOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run, to keep and resume it; default: none.")
    ] = None,
    shard: ShardOption = None,
    as_json: JsonOption = False,
) -> None:
    """The models on unseen synthetic scenes, by kind of expression."""
    from sam4mllm_tool.evaluation.scenes import evaluate_scenes
    from sam4mllm_tool.scenes.expressions import Kind, Wording

    drawn = _world(world)
    if wording not in get_args(Wording):
        raise typer.BadParameter(f"one of {', '.join(get_args(Wording))}", param_hint="--wording")
    settings = _settings(points, candidates)
    load = partial(
        load_models, mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype,
        proposer=proposer, settings=settings, quiet=as_json or engine is Engine.RAY,
    )  # fmt: skip
    others = workers, cpus, gpus, address
    limit = per_kind * len(get_args(Kind)) if per_kind else limit
    with (
        _folder(out) as folder,
        _measuring(engine, load, settings, shard, *others) as model,
        counted("expressions", limit, quiet=as_json) as on_case,
    ):
        report = evaluate_scenes(
            model, folder, seed=seed, limit=limit, strategies=strategy, world=drawn,
            per_kind=per_kind, ask=_ask(ask, "true"), wording=cast("Wording", wording),
            shard=_shard(shard), on_case=on_case,
        )  # fmt: skip
    _show_report(report, out, as_json)


def _benchmark_command(known: str, splits: tuple[str, ...]) -> Callable[..., None]:
    """The command of a data set, or of any that is named with its path."""

    def benchmark(
        data: Annotated[
            str, typer.Option(help="NAME=PATH of the data set, as train takes it; or its folder.")
        ],
        split: Annotated[str, typer.Option(help="A split of the data set, as named above.")],
        limit: LimitOption = None,
        sample_seed: SampleSeedOption = 0,
        ask: Annotated[
            str, typer.Option(help="Count in the questions: data (what the set promises), 0+, …")
        ] = "data",
        unreadable_limit: UnreadableOption = _UNREADABLE,
        strategy: StrategyOption = ["pqpp"],  # noqa: B006
        protocol: ProtocolOption = "ours",
        rule: RuleOption = [],  # noqa: B006
        points: PointsOption = _POINTS,
        candidates: CandidatesOption = "grid",
        mllm: MllmOption = "embedded",
        adapter: AdapterOption = None,
        format: FormatOption = None,
        sam: SamOption = "embedded",
        sam_decoder: SamDecoderOption = None,
        sam_dtype: SamDtypeOption = "auto",
        proposer: ProposerOption = "mllm",
        device: DeviceOption = "auto",
        engine: EngineOption = Engine.LOCAL,
        workers: WorkersOption = 1,
        cpus: CpusOption = 1,
        gpus: GpusOption = 0,
        address: AddressOption = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder of the run; default runs/NAME-SPLIT-PROTOCOL.")
        ] = None,
        shard: ShardOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from sam4mllm_tool.datasets import check_present
        from sam4mllm_tool.datasets.protocol import get_protocol
        from sam4mllm_tool.evaluation.benchmark import evaluate_benchmark

        name, path = _named(data, known)
        rules = get_protocol(protocol).with_rules(rule)
        check_present(name, path, split)
        settings = _settings(points, candidates)
        load = partial(
            load_models, mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype,
            proposer=proposer, settings=settings, quiet=as_json or engine is Engine.RAY,
        )  # fmt: skip
        others = workers, cpus, gpus, address
        folder = out or Path("runs") / "-".join([name, split, *rules.name.split()])
        with (
            _measuring(engine, load, settings, shard, *others) as model,
            counted("expressions", limit, quiet=as_json) as on_case,
        ):
            report = evaluate_benchmark(
                model, name, path.resolve(), split, strategy, folder, limit=limit,
                sample_seed=sample_seed,
                ask=_ask(ask, "data"), protocol=rules, shard=_shard(shard),
                unreadable_limit=unreadable_limit, on_case=on_case,
            )  # fmt: skip
        _show_report(report, folder, as_json)

    benchmark.__doc__ = (
        f"{known} ({', '.join(splits)}), from the original or the hub's files."
        if known
        else "Any data set: --data NAME=PATH, your own too (coco, labelme, jsonl)."
    )
    return benchmark


def _named(data: str, known: str) -> tuple[str, Path]:
    """The data set's name and path from NAME=PATH, or from the path alone where it is known."""
    name, equals, path = data.partition("=")
    if known:
        return known, Path(path if equals and name == known else data)
    if not (equals and path):
        raise typer.BadParameter(f"{data!r} is not NAME=PATH", param_hint="--data")
    return name, Path(path)


BENCHMARKS = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
    "refcocog-google": ("train", "val"),
    "grefcoco": ("train", "val", "testA", "testB"),
    "reasonseg": ("train", "val", "test"),
}
app.command("run")(_benchmark_command("", ()))
for _name, _splits in BENCHMARKS.items():
    app.command(_name)(_benchmark_command(_name, _splits))


def _settings(points: int, candidates: str) -> Settings:
    return Settings(points=points, candidates=candidates)


def _world(name: str) -> World:
    from sam4mllm_tool.scenes.world import WORLDS

    if name not in WORLDS:
        raise typer.BadParameter(f"one of {', '.join(WORLDS)}", param_hint="--world")
    return WORLDS[name]


def _ask(text: str, known: str) -> TargetCount | None:
    """The count asked with; ``None`` for the word that stands for what is known of each case."""
    if text == known:
        return None
    if text not in list(TargetCount):
        words = ", ".join([*TargetCount, known])
        raise typer.BadParameter(f"one of {words}", param_hint="--ask")
    return TargetCount(text)


def _shard(text: str | None) -> Any:
    from sam4mllm_tool.evaluation.run import Shard

    return Shard.parse(text) if text else Shard.from_environment()


@contextmanager
def _measuring(
    engine: Engine,
    load: Callable[[], Sam4MLLM],
    settings: Settings,
    shard: str | None,
    workers: int,
    cpus: float,
    gpus: float,
    address: str | None,
) -> Iterator[Sam4MLLM | EvaluationEngine]:
    """Who measures, within the ``with`` block."""
    if engine is Engine.LOCAL:
        yield load()
        return
    if shard:
        raise InputError("Ray deals the run into shards itself", hint="Leave --shard out.")
    with pool(load, workers, cpus, gpus, address) as others:
        from sam4mllm_tool.cluster.batches import RayEvaluation

        yield RayEvaluation(others, settings)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder asked for, or a temporary one."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _show_report(report: dict[str, Any], folder: Path | None, as_json: bool) -> None:
    from sam4mllm_tool.evaluation.report import to_markdown

    if as_json:
        print_json(report)
        return
    from rich.markdown import Markdown  # slow to import

    console.print(Markdown(to_markdown(report)))
    if folder is not None:
        console.print(f"wrote {folder.resolve()}/report.html", highlight=False, soft_wrap=True)
