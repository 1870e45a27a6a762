"""Strategies: how an expression becomes masks. The place to read the flow from top to bottom.

A strategy is a value with a name and one method. One of your own is passed to
``Sam4MLLM.segment(strategy=…)``::

    class FirstBox:
        name = "first_box"

        def run(self, steps, image, expression, count):
            location = steps.locate(image, expression, count)
            found = location.objects[:1]
            drawn = steps.draw(image, [SegmentPrompt(one.box) for one in found])
            objects = tuple(SegmentedObject(o, (), m) for o, m in zip(found, drawn, strict=True))
            return location, objects
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from sam4mllm_tool.errors import InputError, nearest
from sam4mllm_tool.geometry import clip_box
from sam4mllm_tool.pipeline.candidates import accept, guided, judge, noun_phrase, propose
from sam4mllm_tool.pipeline.points import inner_points
from sam4mllm_tool.pipeline.results import LocatedObject, Location, ScoredBox, SegmentedObject
from sam4mllm_tool.pipeline.steps import DialogueSteps, agreement, choose_mask
from sam4mllm_tool.protocols import MaskCandidate, SegmentPrompt
from sam4mllm_tool.types import Mask, Point, PointLabel, PromptPoint, RgbImage, TargetCount

SMALLEST_REGION = 0.06
"""Depth from which *adaptive* asks about a region, as a share of √(area of the box)."""

SURE_AGAINST_MASK = 0.97
"""Probability from which an answer that contradicts the mask counts in *adaptive*."""

Found = tuple[Location, tuple[SegmentedObject, ...]]


@runtime_checkable
class Strategy(Protocol):
    """Puts the steps of the dialogue together."""

    @property
    def name(self) -> str:
        """What traces and settings call it."""

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Locate, and draw a mask for each object found."""


@dataclass(frozen=True)
class BoxOnly:
    """Round 1 only: the box is all that SAM gets."""

    name: str = "box_only"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Box → mask."""
        location = steps.locate(image, expression, count)
        return _drawn(steps, image, location, [() for _ in location.objects])


@dataclass(frozen=True)
class Pqpp:
    """The paper's main method: a box, then yes or no for points spread over it."""

    name: str = "pqpp"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Box → points → mask."""
        location = steps.locate(image, expression, count)
        boxes = [one.box for one in location.objects]
        points = steps.check_points_of_each(image, location, boxes)
        return _drawn(steps, image, location, points)


@dataclass(frozen=True)
class Ppg:
    """The paper's other method: box and labelled points in one reply."""

    name: str = "ppg"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Box with points → mask."""
        location = steps.locate_with_points(image, expression, count)
        return _drawn(steps, image, location, [one.points for one in location.objects])


@dataclass(frozen=True)
class Adaptive:
    """Ask deep inside the regions that SAM's masks leave, until answers and mask agree.

    Points near outlines are what an MLLM answers worst and what changes a mask least. The deepest
    places of what all masks hold, what some hold and what none holds tell the object from its
    neighbours; what is smaller than ``SMALLEST_REGION`` would change nothing. Deep inside regions
    SAM is rarely wrong, so an answer that contradicts its mask counts from ``SURE_AGAINST_MASK``
    on only, and is undecided below.
    """

    name: str = "adaptive"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Box → mask → points → mask → …"""
        location = steps.locate(image, expression, count)
        if location.objects:
            steps.embed(image)
        return location, tuple(_adapt(steps, image, location, one) for one in location.objects)


@dataclass(frozen=True)
class Propose:
    """Candidates of the expression's noun phrase, of which the MLLM tells the right ones."""

    name: str = "propose"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Phrase → candidates with masks → the MLLM judges each → those that are meant → points."""
        phrase = noun_phrase(expression) if steps.proposer else expression
        judged = judge(steps, image, expression, propose(steps, image, phrase))
        meant = accept(judged, count)
        taken = {id(one) for one in meant}
        others = tuple(ScoredBox(one.box) for one in judged if id(one) not in taken)
        chosen = guided(steps, image, expression, meant)
        stated = steps.stated(image, expression, *(one.box for one in chosen))
        found = tuple(replace(one, alternates=others) for one in stated.objects)
        location = replace(stated, count=count, objects=found)
        pairs = zip(found, chosen, strict=True)
        return location, tuple(SegmentedObject(at, one.points, one.drawn) for at, one in pairs)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (Pqpp(), Ppg(), Adaptive(), BoxOnly(), Propose())
}
"""The built-in strategies by name, the default first."""


def get_strategy(strategy: Strategy | str) -> Strategy:
    """A strategy, or the built-in one of that name.

    Raises:
        InputError: no built-in strategy has this name, or it is not a strategy at all.
    """
    if not isinstance(strategy, str):
        # A class has the members too, but nothing to call them on.
        if isinstance(strategy, type) or not isinstance(strategy, Strategy):
            raise InputError(
                f"{strategy!r} is not a strategy",
                hint="Give a name, or an object with 'name' and 'run'.",
            )
        return strategy
    if strategy not in STRATEGIES:
        raise InputError(
            f"there is no strategy {strategy[:60]!r}",
            hint=nearest(strategy, STRATEGIES, "Strategies"),
        )
    return STRATEGIES[strategy]


def _drawn(
    steps: DialogueSteps,
    image: RgbImage,
    location: Location,
    points: Sequence[tuple[PromptPoint, ...]],
) -> Found:
    """The masks for located objects and their prompt points, drawn in one call."""
    if not location.objects:
        return location, ()
    steps.embed(image)
    pairs = zip(location.objects, points, strict=True)
    drawn = steps.draw(image, [SegmentPrompt(found.box, some) for found, some in pairs])
    parts = zip(location.objects, points, drawn, strict=True)
    return location, tuple(SegmentedObject(*part) for part in parts)


def _adapt(
    steps: DialogueSteps, image: RgbImage, location: Location, found: LocatedObject
) -> SegmentedObject:
    settings = steps.settings
    box = clip_box(found.box, image.width, image.height)
    least = SMALLEST_REGION * math.sqrt(max(box.area, 1.0))
    points: tuple[PromptPoint, ...] = ()
    drawn, regions = _draw_with_regions(steps, image, SegmentPrompt(box))
    while len(points) < settings.budget:
        wanted = min(settings.per_question, settings.budget - len(points))
        places = inner_points(regions, wanted, [Point(one.x, one.y) for one in points], least)
        if not places:
            break
        new = _weighed(steps.check_points(image, location, found.box, places), drawn.mask)
        points += new
        settled = agreement(drawn.mask, new) == 1.0
        drawn, regions = _draw_with_regions(steps, image, SegmentPrompt(box, points))
        if settled:
            break
    return SegmentedObject(found, points, drawn)


def _weighed(points: Sequence[PromptPoint], mask: Mask) -> tuple[PromptPoint, ...]:
    """The points, undecided where an answer contradicts the mask without being sure enough."""

    def counts(point: PromptPoint) -> bool:
        inside = mask.contains(point.x, point.y)
        if inside is (point.label is PointLabel.FOREGROUND):
            return True
        against = point.p_no if inside else point.p_yes
        return against is not None and against >= SURE_AGAINST_MASK

    return tuple(
        point if counts(point) else replace(point, label=PointLabel.UNDECIDED) for point in points
    )


def _draw_with_regions(
    steps: DialogueSteps, image: RgbImage, prompt: SegmentPrompt
) -> tuple[MaskCandidate, np.ndarray]:
    """The chosen mask, and the regions that SAM's masks divide the box into.

    Pixels are of one region if the same masks hold them, so that what all masks hold, what some
    hold and what none holds are apart; 0 outside the box.
    """
    (candidates,) = steps.draw_all(image, [prompt])
    drawn = choose_mask(candidates, prompt.points, steps.settings.choose_by)
    assert prompt.box is not None
    x0, y0, x1, y1 = (round(edge) for edge in prompt.box)
    rows, columns = slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1))
    regions = np.zeros((image.height, image.width), dtype=np.int64)
    regions[rows, columns] = 1 + sum(
        one.mask.pixels[rows, columns].astype(np.int64) << number
        for number, one in enumerate(candidates)
    )
    return drawn, regions
