"""The paper's claim on our own models: do points help, how many, chosen how?

    python -m benchmarks.claims --limit 500 --seed 0 --plot docs/images/claims.png
    python -m benchmarks.claims --limit 500 --seed 0 --overlap 0.9

Every setting answers the same expressions about unseen scenes through the real pipeline; each is
compared with PQPP at its defaults by a paired bootstrap over pictures. Intervals are 95 %. With
`--overlap` the same things stand in front of each other that often, half of each hidden at most:
there a box alone says less.
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

from sam4mllm_tool.evaluation.judge import judge
from sam4mllm_tool.evaluation.metrics import METRICS, Bootstrap, Outcome
from sam4mllm_tool.evaluation.scenes import scene_cases
from sam4mllm_tool.pipeline.model import Sam4MLLM, load
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.scenes.world import SMALL_WORLD, World

REFERENCE = "pqpp, 9 grid"
COUNTS = (4, 9, 16, 25, 36)
THRESHOLDS = {"0.5 / 0.5": (0.5, 0.5), "0.75 / 0.75": (0.75, 0.75), "0.97 / 0.95": (0.97, 0.95)}
SHOWN = ("cIoU", "gIoU", "point_accuracy", "questions", "seconds")


def settings() -> Iterator[tuple[str, Settings]]:
    """Every setting that is compared, by name."""
    yield "box only", Settings(strategy="box_only")
    yield "ppg, 3 + 1", Settings(strategy="ppg")
    for count in COUNTS:
        yield f"pqpp, {count} grid", Settings(points=count)
        yield f"pqpp, {count} poisson", Settings(points=count, candidates="poisson")
    for name, (background, foreground) in THRESHOLDS.items():
        limits = Thresholds(background=background, foreground=foreground)
        yield f"pqpp, p_no / p_yes over {name}", Settings(thresholds=limits)
    for budget in (6, 9):
        yield f"adaptive, up to {budget}", Settings(strategy="adaptive", budget=budget)


def answer(model: Sam4MLLM, world: World, seed: int, limit: int) -> dict[str, list[Outcome]]:
    """Outcomes of each setting on the same expressions, which share the picture's prefix."""
    models = {name: replace(model, settings=chosen) for name, chosen in settings()}
    found: dict[str, list[Outcome]] = {name: [] for name in models}
    cases = scene_cases(seed, limit, world=world)
    for case in track(cases(), total=limit, description="expressions"):
        image, asked = case.open_image(), replace(case, ask_presence=False)
        for name, one in models.items():
            found[name].append(judge(one, asked, image).outcome)
    return found


def compare(found: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """A row a setting: metrics, and cIoU's difference from the reference setting."""
    bootstrap, rows = Bootstrap(), []
    for name, outcomes in found.items():
        row: dict[str, Any] = {"setting": name}
        for metric in SHOWN:
            row[metric] = asdict(bootstrap.estimate(outcomes, METRICS[metric]))
        gap = bootstrap.compare(found[REFERENCE], outcomes, METRICS["cIoU"])
        rows.append(row | {"against_reference": asdict(gap)})
    return rows


def order(found: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """The paper's order, step by step: box only < PPG < PQPP."""
    steps = (("box only", "ppg, 3 + 1"), ("ppg, 3 + 1", REFERENCE), ("box only", REFERENCE))
    bootstrap = Bootstrap()
    return [
        {"first": first, "second": second}
        | asdict(bootstrap.compare(found[first], found[second], METRICS["cIoU"]))
        for first, second in steps
    ]


def as_markdown(rows: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    lines = ["| setting | cIoU | gIoU | point acc. | questions | s | cIoU − pqpp's, paired |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        cells = [_interval(row["cIoU"]), f"{row['gIoU']['value']:.3f}"]
        points = row["point_accuracy"]["value"]
        cells.append("–" if points is None else f"{points:.3f}")
        cells += [f"{row['questions']['value']:.1f}", f"{row['seconds']['value']:.2f}"]
        gap = "" if row["setting"] == REFERENCE else _gap(row["against_reference"])
        lines.append(f"| {row['setting']} | {' | '.join(cells)} | {gap} |")
    lines += ["", "| step | difference in cIoU | p |", "|---|---|---|"]
    lines += [f"| {s['first']} → {s['second']} | {_gap(s)} | {s['p_value']:.3f} |" for s in steps]
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """cIoU against questions asked, with intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    looks = {"pqpp, grid": "o-", "pqpp, poisson": "s--", "box only": "k^", "ppg": "rv",
             "adaptive": "gD-"}  # fmt: skip
    for family, look in looks.items():
        mine = [r for r in rows if _family(r["setting"]) == family]
        value = [r["cIoU"]["value"] for r in mine]
        spread = [[v - r["cIoU"]["low"] for v, r in zip(value, mine, strict=True)],
                  [r["cIoU"]["high"] - v for v, r in zip(value, mine, strict=True)]]  # fmt: skip
        asked = [r["questions"]["value"] for r in mine]
        axes.errorbar(asked, value, spread, fmt=look, capsize=2, label=family, alpha=0.8)
    axes.set(xlabel="questions an expression", ylabel="cIoU (95 % intervals)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def _family(setting: str) -> str:
    if "over" in setting:
        return "thresholds"
    kind = setting.partition(",")[0]
    return f"{kind}, {setting.split()[-1]}" if kind == "pqpp" else kind


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def _gap(found: dict[str, float]) -> str:
    return f"{found['value']:+.3f} ({found['low']:+.3f} … {found['high']:+.3f})"


def main() -> None:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", type=float)
    parser.add_argument("--mllm", default="embedded")
    parser.add_argument("--adapter")
    parser.add_argument("--sam", default="embedded")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.mllm, adapter=options.adapter, segmenter=options.sam, device="cpu")
    world = SMALL_WORLD
    if options.overlap is not None:
        world = replace(world, name="small-overlap", objects=(2, 3), overlap=options.overlap,
                        min_visible=0.5)  # fmt: skip
    found = answer(model, world, options.seed, options.limit)
    rows, steps = compare(found), order(found)
    print(as_markdown(rows, steps))
    if options.json:
        options.json.write_text(json.dumps({"settings": rows, "order": steps}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
