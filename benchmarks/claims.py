"""The paper's claim on our own models: do points help, how many, and how should they be chosen?

    python -m benchmarks.claims --world small-overlap --seeds 11 12 13 14 15 --limit 60
    python -m benchmarks.claims --world small --seeds 11 12 13 14 15 --limit 60 --jitter 0.25

Every setting answers the same expressions about unseen scenes of several seeds through the real
pipeline; what several settings ask alike is computed once (:mod:`benchmarks.memory`), and counts in
the seconds of each. Counterfactuals are measured too: the points of PQPP with other labels, as if
the MLLM knew the neighbours, the edges or everything, or as if a filter dropped each wrong answer.
Each row is compared with the box alone and with PQPP by a paired bootstrap over pictures; intervals
are 95 %. Thresholds are chosen on other seeds than those they are measured on. ``--jitter`` moves
the edges of every box of round 1 by up to that share of its side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.counterfactuals import LooseBoxes, pooled, relabelled, thresholded
from benchmarks.memory import Memory, RememberingMllm, RememberingSegmenter
from sam4mllm_tool.evaluation.bootstrap import Bootstrap
from sam4mllm_tool.evaluation.cases import Case, sampled
from sam4mllm_tool.evaluation.judge import judge
from sam4mllm_tool.evaluation.metrics import METRICS
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.places import PLACES
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.scenes.world import WORLDS

REFERENCE, MAIN, CHOSEN = "box only", "pqpp, 9 grid", "pqpp, thresholds of other seeds"
AGAINST = {"against_box_only": REFERENCE, "against_pqpp": MAIN}
"""What each row is compared with, by key of the row."""
SETTINGS = {
    REFERENCE: Settings(strategy="box_only"),
    "ppg, 3 + 1": Settings(strategy="ppg"),
    MAIN: Settings(),
    "pqpp, 4 grid": Settings(points=4),
    "pqpp, 16 grid": Settings(points=16),
    "pqpp, 9 poisson": Settings(candidates="poisson"),
    "adaptive, 9 grid": Settings(strategy="adaptive"),
    "adaptive, 16 grid": Settings(strategy="adaptive", points=16),
}
POOL = 10
"""Times as many expressions are drawn from, so that a seed's lie on some two dozen pictures."""
THRESHOLDS = ((0.5, 0.5), (0.75, 0.75), (0.9, 0.75), (0.97, 0.95), (0.99, 0.99))
"""(p_no, p_yes) that are chosen from; the third pair is the published one."""
SHOWN = ("cIoU", "gIoU", "point_accuracy", *(f"points_on_{place}" for place in PLACES),
         "stated_on", "stated_off", "box_acc50", "questions", "seconds")  # fmt: skip

Found = dict[str, list[tuple[int, Outcome]]]
"""Each row's outcomes with their seeds."""


def answer(model: LooseBoxes, world: str, seeds: Sequence[int], limit: int) -> Found:
    """Outcomes of each setting and counterfactual on the same expressions."""
    found: Found = {}
    memory = Memory()
    model = replace(
        model,
        mllm=RememberingMllm(model.mllm, memory),
        segmenter=RememberingSegmenter(model.segmenter, memory),
    )
    cases = [
        (seed, replace(case, ask_presence=False))
        for seed in seeds
        for case in sampled(scene_cases(seed, POOL * limit, world=WORLDS[world]), limit, seed)()
    ]
    for seed, case in track(cases, description=world):
        memory.forget()
        for name, outcome in _answer(model, memory, case):
            found.setdefault(name, []).append((seed, outcome))
    found[CHOSEN] = choose_thresholds(found, seeds)
    return found


def _answer(model: LooseBoxes, memory: Memory, case: Case) -> Iterator[tuple[str, Outcome]]:
    """Outcomes of one expression, with the seconds of the settings that were really asked."""
    image = case.open_image()
    for name, settings in SETTINGS.items():
        one = replace(model, settings=settings)
        saved = memory.saved
        outcome = judge(one, case, image).outcome
        yield name, replace(outcome, seconds=outcome.seconds + memory.saved - saved)
        if name == MAIN:  # once more, all of it from memory
            found = one.segment(image, case.expression, count=case.count)
            for rule, outcome in relabelled(one, image, case, found):
                yield f"{MAIN}, {rule}", outcome
            for pair in THRESHOLDS:
                yield _over(pair), thresholded(one, image, case, found, Thresholds(*pair))


def choose_thresholds(found: Found, seeds: Sequence[int]) -> list[tuple[int, Outcome]]:
    """Each seed's outcomes with the pair that has the best cIoU on all other seeds."""
    chosen: list[tuple[int, Outcome]] = []
    for seed in seeds:
        best = max(THRESHOLDS, key=lambda pair: METRICS["cIoU"](
            [one for other, one in found[_over(pair)] if other != seed]))  # fmt: skip
        chosen += [(s, one) for s, one in found[_over(best)] if s == seed]
    return chosen


def compare(found: Found) -> list[dict[str, Any]]:
    """One row per setting: metrics, and cIoU's differences from the box alone and from PQPP."""
    bootstrap, rows = Bootstrap(), []
    references = {key: pooled(found[name]) for key, name in AGAINST.items()}
    for name, with_seeds in found.items():
        outcomes = pooled(with_seeds)
        row: dict[str, Any] = {"setting": name}
        for metric in SHOWN:
            row[metric] = asdict(bootstrap.estimate(outcomes, METRICS[metric]))
        for key, reference in references.items():
            row[key] = asdict(bootstrap.compare(reference, outcomes, METRICS["cIoU"]))
        rows.append(row)
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one row per setting."""
    metrics = ("point_accuracy", *(f"points_on_{place}" for place in PLACES))
    gaps = [f"− {name}" for name in AGAINST.values()]
    titles = ["setting", "cIoU", *gaps, "points", *PLACES, "questions", "s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            row["setting"],
            f"{row['cIoU']['value']:.3f} ({row['cIoU']['low']:.3f}–{row['cIoU']['high']:.3f})",
            *("" if row["setting"] == name else _gap(row[key]) for key, name in AGAINST.items()),
            *(_number(row[metric]["value"], 3) for metric in metrics),
            _number(row["questions"]["value"] or None, 1),
            _number(row["seconds"]["value"] or None, 2),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """cIoU's difference from the box alone, one row per setting, with intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 1), layout="constrained")
    shown = [row for row in rows if row["setting"] != REFERENCE][::-1]
    for number, row in enumerate(shown):
        gap = row["against_box_only"]
        spread = [[gap["value"] - gap["low"]], [gap["high"] - gap["value"]]]
        axes.errorbar(gap["value"], number, xerr=spread, fmt="o", capsize=2, color="tab:blue")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["setting"] for row in shown])
    axes.set(xlabel="cIoU − that of the box alone (95 % intervals)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def _over(pair: tuple[float, float]) -> str:
    return f"pqpp, p_no / p_yes over {pair[0]} / {pair[1]}"


def _gap(gap: dict[str, float]) -> str:
    return f"{gap['value']:+.3f} ({gap['low']:+.3f} … {gap['high']:+.3f})"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=100, help="expressions per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--world", default="small", choices=sorted(WORLDS))
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--mllm", default="embedded")
    parser.add_argument("--adapter")
    parser.add_argument("--sam", default="embedded")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(options.mllm, adapter=options.adapter, segmenter=options.sam, device="cpu")
    model = LooseBoxes(loaded.mllm, loaded.segmenter, format=loaded.format, share=options.jitter)
    rows = compare(answer(model, options.world, options.seeds, options.limit))
    print(as_markdown(rows))
    if options.json:
        about = {"world": options.world, "seeds": options.seeds, "limit": options.limit,
                 "jitter": options.jitter}  # fmt: skip
        options.json.write_text(json.dumps({"about": about, "settings": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
