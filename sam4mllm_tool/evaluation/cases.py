"""One expression to be judged, and where it comes from: a data set or the scene generator."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from sam4mllm_tool.datasets import ReferringExample
from sam4mllm_tool.types import Box, Mask, RgbImage, TargetCount


@dataclass(frozen=True)
class Case:
    """An expression with its truth; the picture is opened and the masks decoded when asked for.

    Attributes:
        case: unique id within a run.
        image: id of the picture; cases on one picture follow each other.
        boxes: of the targets, pixels; empty without target.
        others: the picture's other objects, decoded; ``None`` if they are not known.
        count: number of targets stated in the question.
        kind: of expression.
        scored: the targets' masks at ``scored_size`` (width, height), if masks are compared at
            another size than the picture's.
        decides: whether the statement that nothing is there counts in the IoU (ReLA's no-target
            head).
        ask_presence: also ask, as a question of its own, whether there is a target at all.
    """

    case: str
    image: str
    expression: str
    open_image: Callable[[], RgbImage]
    truth: Callable[[], list[Mask]]
    boxes: tuple[Box, ...]
    ignore: Callable[[], Mask | None] = lambda: None
    others: Callable[[], list[Mask] | None] = lambda: None
    count: TargetCount = TargetCount.ONE
    kind: str = ""
    scored: Callable[[], list[Mask]] | None = None
    scored_size: tuple[int, int] | None = None
    decides: bool = False
    ask_presence: bool = False


Cases: TypeAlias = "Callable[[], Iterator[Case]]"
"""A run's cases from the start, each time it is called."""


def cases_of(examples: Iterable[ReferringExample]) -> Iterator[Case]:
    """One case per expression; an unreadable record is one case, which fails when opened."""
    for example in examples:
        for name, expression in example.cases():
            yield Case(
                case=name,
                image=example.image_id,
                expression=expression,
                open_image=example.open_image,
                truth=example.truth,
                boxes=example.boxes,
                ignore=example.ignored,
                others=example.others,
                count=example.count,
                kind=example.kind,
                scored=example.scored_truth if example.scored_size else None,
                scored_size=example.scored_size,
                decides=example.decides,
            )


def sampled(cases: Cases, limit: int | None, seed: int = 0) -> Cases:
    """``limit`` cases drawn at random, from as many pictures as possible, in their order.

    Expressions are equally likely, except that a second one of a picture is drawn only
    when every picture has one, a third when every picture has two, and so on.

    Args:
        limit: ``None`` gives all cases.
        seed: the same cases and seed give the same sample.
    """
    if limit is None:
        return cases

    known: list[frozenset[str]] = []

    def chosen() -> frozenset[str]:
        if not known:  # no functools.cache: other processes get a copy of this function
            known.append(_drawn([(case.image, case.case) for case in cases()], limit, seed))
        return known[0]

    return lambda: (case for case in cases() if case.case in chosen())


def _drawn(keys: list[tuple[str, str]], limit: int, seed: int) -> frozenset[str]:
    """``limit`` of the cases, given as (picture, case)."""
    random.Random(seed).shuffle(keys)
    before: Counter[str] = Counter()
    ranked = []
    for image, name in keys:
        ranked.append((before[image], name))
        before[image] += 1
    ranked.sort(key=lambda one: one[0])
    return frozenset(name for _, name in ranked[:limit])


def asked_with(cases: Cases, count: TargetCount | None) -> Cases:
    """The cases, all asked with this count; ``None`` leaves each its own."""
    if count is None:
        return cases
    return lambda: (replace(case, count=count) for case in cases())
