"""A benchmark end to end: cases → lines → report files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.datasets.protocol import OURS, Protocol
from sam4mllm_tool.disk import exclusive, write_whole
from sam4mllm_tool.evaluation.cases import Cases, asked_with, cases_of, sampled
from sam4mllm_tool.evaluation.pictures import report_page
from sam4mllm_tool.evaluation.published import published_for, where_published
from sam4mllm_tool.evaluation.report import Document, build_report, to_markdown
from sam4mllm_tool.evaluation.run import (
    UNREADABLE_LIMIT,
    Shard,
    measure,
    read_lines,
    read_skipped,
)
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.types import TargetCount


class Engine(Interface):
    """Who measures, if it is not this process."""

    @property
    def names(self) -> tuple[str, str]:
        """The MLLM's name and the segmenter's."""

    @property
    def settings(self) -> Settings:
        """How the dialogue is held."""

    def measure(
        self,
        cases: Cases,
        strategies: Sequence[str],
        folder: Path,
        about: dict[str, Any],
        unreadable_limit: int,
        on_case: Callable[[str], None],
    ) -> None:
        """Write the lines that are missing; see :func:`~sam4mllm_tool.evaluation.run.measure`."""


def evaluate(
    model: Sam4MLLM | Engine,
    cases: Cases,
    strategies: Sequence[str],
    folder: Path,
    about: dict[str, Any],
    *,
    protocol: Protocol = OURS,
    shard: Shard | None = None,
    unreadable_limit: int = UNREADABLE_LIMIT,
    on_case: Callable[[str], None] = lambda _: None,
) -> Document:
    """Measure what is missing in ``folder``, and write ``report.json``, ``.md`` and ``.html``.

    With shards, the report covers the lines written by then: the last shard to end writes the
    complete report, and running any shard again when no cases are left rewrites it.

    Args:
        cases: gives the run's cases from the start each time it is called.
        model: measures in this process; or an engine that uses others, and takes no ``shard``.
        about: what is measured (``title`` and more).
        protocol: by which the cases were made; named beside the figures.

    Returns:
        The JSON document, see :func:`~sam4mllm_tool.evaluation.report.build_report`.
    """
    if isinstance(model, Sam4MLLM):
        mllm, segmenter = model.mllm.name, model.segmenter.name
    else:
        mllm, segmenter = model.names
    noted = {**about, "mllm": mllm, "segmenter": segmenter,
             "settings": _settings(model.settings), "strategies": list(strategies),
             "protocol": protocol.name, "rules": protocol.rules}  # fmt: skip
    if isinstance(model, Sam4MLLM):
        measure(
            model, cases(), strategies, folder, noted,
            shard=shard, unreadable_limit=unreadable_limit, on_case=on_case,
        )  # fmt: skip
    else:
        model.measure(cases, strategies, folder, noted, unreadable_limit, on_case)
    return write_report(folder, cases, noted)


def write_report(folder: Path, cases: Cases, about: dict[str, Any]) -> Document:
    """The three report files from the lines in ``folder``."""
    names = set(about["strategies"])
    with exclusive(folder / ".lock", str(folder), wait=True):
        lines = [line for line in read_lines(folder) if line.strategy in names]
        # A shard that is still running may have judged its last case by some strategies only.
        judged = Counter(line.case for line in lines)
        lines = [line for line in lines if judged[line.case] == len(names)]
        split = about.get("benchmark", ""), about.get("split", "")
        whole = len(lines) // max(1, len(names))
        report = build_report(
            lines,
            about,
            published=published_for(*split, about["protocol"], whole),
            where_published=where_published(*split),
            skipped=read_skipped(folder),
        )
        write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_whole(folder / "report.md", to_markdown(report))
        write_whole(folder / "report.html", report_page(report, lines, cases()))
    return report


def benchmark_cases(
    name: str,
    data: Path,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    protocol: Protocol = OURS,
) -> Cases:
    """The expressions of a data set's split, or a sample of ``limit`` of them (:func:`sampled`)."""
    return sampled(
        lambda: cases_of(load_examples(name, data, split, protocol=protocol)), limit, seed
    )


def evaluate_benchmark(
    model: Sam4MLLM | Engine,
    name: str,
    data: Path,
    split: str,
    strategies: Sequence[str],
    folder: Path,
    *,
    limit: int | None = None,
    sample_seed: int = 0,
    ask: TargetCount | None = None,
    protocol: Protocol = OURS,
    shard: Shard | None = None,
    unreadable_limit: int = UNREADABLE_LIMIT,
    on_case: Callable[[str], None] = lambda _: None,
) -> Document:
    """A benchmark through the pipeline, beside the figures published for the same split.

    Args:
        limit, sample_seed: measure a sample of so many expressions.
        ask: the count every question has; ``None``: what the data set promises.
    """
    about = {"title": f"{name} {split}", "benchmark": name, "split": split, "limit": limit,
             "sample seed": sample_seed if limit else None,
             "asked with": ask.value if ask else "what the data set promises"}  # fmt: skip
    return evaluate(
        model,
        asked_with(benchmark_cases(name, data, split, limit, sample_seed, protocol), ask),
        strategies,
        folder,
        about,
        protocol=protocol,
        shard=shard,
        unreadable_limit=unreadable_limit,
        on_case=on_case,
    )


def _settings(settings: Settings) -> dict[str, Any]:
    noted: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    noted.pop("strategy", None)
    return noted
