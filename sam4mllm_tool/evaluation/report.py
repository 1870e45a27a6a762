"""A run's lines as numbers: one JSON document, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sam4mllm_tool.evaluation.bootstrap import Bootstrap, summarise
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.published import Published
from sam4mllm_tool.evaluation.run import Line, Skipped

COMPARED = ("cIoU", "gIoU")
BY_KIND = ("cIoU", "gIoU", "box_acc50", "point_accuracy", "ece", "n_acc", "t_acc")
_PLAIN = frozenset({"questions", "seconds"})  # not shares of 1

Document = dict[str, Any]


def build_report(
    lines: Sequence[Line],
    about: Document,
    *,
    published: Sequence[Published] = (),
    where_published: str = "",
    skipped: Sequence[Skipped] = (),
    bootstrap: Bootstrap | None = None,
) -> Document:
    """The JSON document of a run.

    At the top level stand the metrics of the first strategy (``cIoU``, ``gIoU``, …; ``None`` where
    a metric is not defined), its ``intervals`` (95 %, resampling pictures), ``by_kind`` and
    ``cases``; ``strategies`` holds the same for each strategy, ``comparisons`` the paired bootstrap
    of neighbours, ``published`` what others have published for just such a run
    (``where_published``: of what run there is something), ``skipped`` the pictures that cannot be
    read, whose cases are in none of the numbers.
    """
    resampler = bootstrap or Bootstrap()
    names = list(about["strategies"])
    outcomes = {name: [one.judged.outcome for one in lines if one.strategy == name]
                for name in names}  # fmt: skip
    strategies = {
        name: _describe(found, lines, name, about.get("protocol", "ours"), resampler)
        for name, found in outcomes.items()
    }
    return {
        **strategies[names[0]],
        "strategies": strategies,
        "comparisons": [
            {"first": a, "second": b, "metric": metric, **_difference(outcomes, a, b, metric,
                                                                      resampler)}
            for a, b in pairwise(names) for metric in COMPARED if outcomes[a]
        ],
        "published": [vars(one) for one in published],
        "where_published": where_published,
        "skipped": [vars(one) for one in skipped],
        "about": about,
    }  # fmt: skip


def _describe(
    outcomes: Sequence[Outcome],
    lines: Sequence[Line],
    name: str,
    protocol: str,
    bootstrap: Bootstrap,
) -> Document:
    summary = summarise(outcomes, bootstrap)
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes if outcome.kind)
    return {
        **{metric: one.value for metric, one in summary.items()},
        "intervals": {m: [one.low, one.high] for m, one in summary.items() if one.low is not None},
        "by_kind": {kind: _of_kind(outcomes, kind, bootstrap) for kind in sorted(kinds)},
        "cases": len(outcomes),
        "protocol": protocol,
        "unreadable_replies": sum(1 for one in lines if one.strategy == name and one.judged.error),
    }


def _of_kind(outcomes: Sequence[Outcome], kind: str, bootstrap: Bootstrap) -> Document:
    some = [outcome for outcome in outcomes if outcome.kind == kind]
    summary = summarise(some, bootstrap)
    return {
        **{metric: one.value for metric, one in summary.items()},
        "intervals": {m: [one.low, one.high] for m, one in summary.items() if one.low is not None},
        "cases": len(some),
    }


def _difference(
    outcomes: dict[str, list[Outcome]], a: str, b: str, metric: str, bootstrap: Bootstrap
) -> Document:
    found = bootstrap.compare(outcomes[a], outcomes[b], METRICS[metric])
    return vars(found)


def to_markdown(report: Document) -> str:
    """The report as tables; shares in percent."""
    about = report["about"]
    parts = [f"# {about['title']}", ""]
    parts += [f"- {key}: {value}" for key, value in about.items() if key != "title"]
    named = [f"{name}, protocol {one['protocol']}" for name, one in report["strategies"].items()]
    parts += ["", "| metric | " + " | ".join(named) + " |"]
    parts.append("|---" * (len(report["strategies"]) + 1) + "|")
    for metric in METRICS:
        cells = [metric_cell(metric, one) for one in report["strategies"].values()]
        if any(cells):
            parts.append(f"| {metric} | " + " | ".join(cells) + " |")
    for one in report["strategies"].values():
        if one["unreadable_replies"]:
            parts += ["", f"{one['unreadable_replies']} replies could not be read; they count as "
                      "nothing predicted."]  # fmt: skip
    parts += _skipped_list(report)
    parts += _kind_table(report)
    if report["comparisons"]:
        parts += [
            "",
            f"## Second minus first, protocol {report['protocol']} (paired bootstrap)",
            "",
        ]
        parts += [
            f"- {c['metric']}: {c['second']} − {c['first']} = {100 * c['value']:+.1f} "
            f"[{100 * c['low']:+.1f}, {100 * c['high']:+.1f}], p = {c['p_value']:.3f}"
            for c in report["comparisons"]
        ]
    if report["published"]:
        head = f"## Published by others for this split, protocol {report['protocol']}"
        parts += ["", f"{head} (not measured here)", ""]
        parts += ["| system | metric | value |", "|---|---|---|"]
        parts += [
            f"| {p['system']} | {p['metric']} | {100 * p['value']:.1f} |"
            for p in report["published"]
        ]
    elif report["where_published"]:
        parts += ["", f"{report['where_published']} This run is not that, so none stand here."]
    return "\n".join(parts) + "\n"


def _skipped_list(report: Document) -> list[str]:
    """The pictures that are in none of the numbers, by name."""
    skipped = report["skipped"]
    if not skipped:
        return []
    cases = sum(len(one["cases"]) for one in skipped)
    head = f"{len(skipped)} pictures ({cases} cases) cannot be read; the numbers are without them"
    return ["", f"**{head}:**", "", *(f"- {one['image']}: {one['error']}" for one in skipped)]


def _kind_table(report: Document) -> list[str]:
    """The first strategy by kind."""
    if not report["by_kind"]:
        return []
    shown = [m for m in BY_KIND if any(one[m] is not None for one in report["by_kind"].values())]
    rows = [
        "",
        f"## By kind, protocol {report['protocol']}",
        "",
        "| kind | cases | " + " | ".join(shown) + " |",
    ]
    rows.append("|---" * (len(shown) + 2) + "|")
    for kind, one in report["by_kind"].items():
        cells = " | ".join(metric_number(m, one[m]) for m in shown)
        rows.append(f"| {kind} | {one['cases']} | {cells} |")
    return rows


def metric_cell(metric: str, one: Document) -> str:
    """A strategy's metric with its interval, empty where it is not defined."""
    value = metric_number(metric, one[metric])
    if metric not in one["intervals"]:
        return value
    low, high = (metric_number(metric, number) for number in one["intervals"][metric])
    return f"{value} [{low}, {high}]"


def metric_number(metric: str, value: float | None) -> str:
    """A number as people read it: shares in percent."""
    if value is None:
        return ""
    return f"{value:.2f}" if metric in _PLAIN else f"{100 * value:.1f}"
