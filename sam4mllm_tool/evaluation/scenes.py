"""The models on unseen synthetic scenes, through the real pipeline, by kind of expression.

Each expression is asked as the tools ask by default: with ``0+``, whatever the truth. The true
count (``ask=None``: ``1`` for a single object, ``1+`` for a plural, ``0+`` for an absent one)
reveals part of the answer; whether there is a target is then asked separately, with ``0+``, of the
expressions that have one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from sam4mllm_tool.evaluation.benchmark import Engine, evaluate
from sam4mllm_tool.evaluation.cases import Case, Cases, asked_with, sampled
from sam4mllm_tool.evaluation.outcome import Outcome
from sam4mllm_tool.evaluation.report import Document
from sam4mllm_tool.evaluation.run import Shard, read_lines
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.scenes.expressions import ReferringExpression, Wording, expressions
from sam4mllm_tool.scenes.render import Scene, render_scene
from sam4mllm_tool.scenes.world import SMALL_WORLD, World
from sam4mllm_tool.types import Box, Mask, RgbImage, TargetCount

MOST_SCENES = 20_000
POOL = 4
BASELINE_CELLS = 6
"""Cells per side of the box, to which the position-only baseline rounds a point's place."""


def scene_cases(
    seed: int,
    limit: int,
    *,
    world: World = SMALL_WORLD,
    split: str = "test",
    per_kind: int | None = None,
    ask: TargetCount | None = TargetCount.ZERO_OR_MORE,
    wording: Wording = "train",
) -> Cases:
    """The first ``limit`` expressions of a split's scenes, asked with ``ask`` (or the true count).

    With ``per_kind`` at most that many of each kind are taken: some kinds are rare in the stream,
    and a few cases would be too few to measure them. ``MOST_SCENES`` are searched.
    """

    def cases() -> Iterator[Case]:
        taken: Counter[str] = Counter()
        for index in range(MOST_SCENES):
            scene = render_scene(world, split, index, seed)
            for phrase in expressions(scene, random.Random(index), wording):
                if taken.total() == limit:
                    return
                if per_kind is None or taken[phrase.kind] < per_kind:
                    yield _case(scene, phrase, f"{index}:{taken.total()}")
                    taken[phrase.kind] += 1

    return asked_with(cases, ask)


def _case(scene: Scene, phrase: ReferringExpression, name: str) -> Case:
    targets = [scene.objects[n] for n in phrase.targets]
    others = [thing for n, thing in enumerate(scene.objects) if n not in phrase.targets]
    counts = {0: TargetCount.ZERO_OR_MORE, 1: TargetCount.ONE}
    return Case(
        case=name,
        image=str(scene.index),
        expression=phrase.text,
        open_image=lru_cache(maxsize=1)(lambda: RgbImage.from_pil(scene.image)),
        truth=lambda: [Mask(target.mask) for target in targets],
        boxes=tuple(Box(*target.box) for target in targets),
        others=lambda: [Mask(other.mask) for other in others],
        count=counts.get(len(targets), TargetCount.ONE_OR_MORE),
        kind=phrase.kind,
        ask_presence=bool(targets),
    )


def evaluate_scenes(
    model: Sam4MLLM | Engine,
    folder: Path,
    *,
    seed: int,
    limit: int,
    strategies: Sequence[str] = ("pqpp",),
    world: World = SMALL_WORLD,
    per_kind: int | None = None,
    ask: TargetCount | None = TargetCount.ZERO_OR_MORE,
    wording: Wording = "train",
    shard: Shard | None = None,
    on_case: Callable[[str], None] = lambda _: None,
) -> Document:
    """Measure on ``limit`` expressions about unseen scenes of ``world``; see :func:`scene_cases`.

    They are a sample of ``POOL`` times as many, so that they lie on more than a few scenes; with
    ``per_kind`` the first of each kind.

    Returns:
        The report of :func:`~sam4mllm_tool.evaluation.report.build_report`, with
        ``point_baseline``: balanced accuracy of a classifier that sees only where a point lies in
        its box.
    """
    about = {"title": f"scenes of the {world.name} world", "seed": seed, "limit": limit,
             "world": world.name, "split": "test", "per_kind": per_kind, "wording": wording,
             "asked with": ask.value if ask else "the true count"}  # fmt: skip
    drawn = limit if per_kind else POOL * limit
    cases = scene_cases(seed, drawn, world=world, per_kind=per_kind, ask=ask, wording=wording)
    cases = sampled(cases, limit, seed)
    report = evaluate(model, cases, strategies, folder, about, shard=shard, on_case=on_case)
    asked = next((s for s in strategies if s in ("pqpp", "adaptive")), None)
    outcomes = [one.judged.outcome for one in read_lines(folder) if one.strategy == asked]
    return {**report, "point_baseline": position_baseline(outcomes)}


def position_baseline(outcomes: Sequence[Outcome]) -> float | None:
    """Balanced accuracy of guessing from a point's place in its box alone, cross-fitted.

    Pictures are divided into two halves. For each half, the share of points inside is counted per
    cell of the box on the other half, and a point is called inside where that share is above the
    overall share (the best choice for balanced accuracy).
    """
    rows = [
        (number, point.u, point.v, point.inside)
        for number, points in enumerate(_by_image(outcomes))
        for point in points
    ]
    if not rows:
        return None
    table = np.array(rows, dtype=np.float64)
    half, inside = table[:, 0].astype(int) % 2, table[:, 3] > 0
    places = np.clip((table[:, 1:3] * BASELINE_CELLS).astype(int), 0, BASELINE_CELLS - 1)
    cell = places[:, 1] * BASELINE_CELLS + places[:, 0]
    guess = np.zeros(len(table), dtype=bool)
    for fold in (0, 1):
        seen, asked = half != fold, half == fold
        cells = BASELINE_CELLS**2
        hits = np.bincount(cell[seen & inside], minlength=cells)
        total = np.bincount(cell[seen], minlength=cells)
        overall = inside[seen].mean() if seen.any() else 0.5
        share = np.divide(hits, total, out=np.full(cells, overall), where=total > 0)
        guess[asked] = share[cell[asked]] > overall
    if inside.all() or not inside.any():
        return None
    return float((guess[inside].mean() + (~guess[~inside]).mean()) / 2)


def _by_image(outcomes: Sequence[Outcome]) -> Iterator[list]:
    """Points of each picture."""
    images: dict[str, list] = {}
    for outcome in outcomes:
        images.setdefault(outcome.image, []).extend(outcome.points)
    yield from images.values()
