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
from sam4mllm_tool.pipeline.candidates import accept, guided, judge, noun_phrase, propose
from sam4mllm_tool.pipeline.results import Location, ScoredBox, SegmentedObject
from sam4mllm_tool.pipeline.steps import DialogueSteps, agreement
from sam4mllm_tool.protocols import SegmentPrompt
from sam4mllm_tool.types import Box, Mask, Point, PromptPoint, RgbImage, TargetCount

DEEP = 0.03
"""Distance from its mask's outline from which *adaptive* asks, as a share of √(area of the box)."""

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
    """Ask only about points whose answers can change the mask.

    SAM's mask of the box is mostly right, least so at its outline, where an MLLM's answers are
    wrong most often. So of PQPP's candidate points those are asked about that lie well inside that
    mask. It stays where no answer contradicts it; where one does, SAM draws again with all of them.
    """

    name: str = "adaptive"

    def run(
        self, steps: DialogueSteps, image: RgbImage, expression: str, count: TargetCount
    ) -> Found:
        """Box → mask → points → mask, where an answer contradicts the first one."""
        location, drawn = BoxOnly().run(steps, image, expression, count)
        objects = list(drawn)
        boxes = [one.box for one in location.objects]
        places = [
            _well_inside(one.mask, box, steps.candidate_points(box, image))
            for one, box in zip(objects, boxes, strict=True)
        ]
        asked = [number for number, some in enumerate(places) if some]
        answers = steps.check_points_of_each(
            image, location, [boxes[n] for n in asked], [places[n] for n in asked]
        )
        for number, points in zip(asked, answers, strict=True):
            objects[number] = replace(objects[number], points=points)
        doubted = [n for n, one in enumerate(objects) if agreement(one.mask, one.points) < 1]
        prompts = [SegmentPrompt(boxes[n], objects[n].points) for n in doubted]
        if prompts:
            for number, again in zip(doubted, steps.draw(image, prompts), strict=True):
                objects[number] = replace(objects[number], drawn=again)
        return location, tuple(objects)


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


def _well_inside(mask: Mask, box: Box, points: Sequence[Point]) -> list[Point]:
    """The points that lie in the mask, :data:`DEEP` or more from its outline."""
    from scipy.ndimage import distance_transform_edt  # slow to import, so not at server start

    depth = distance_transform_edt(np.pad(mask.pixels, 1))[1:-1, 1:-1]
    least = max(DEEP * math.sqrt(box.area), 1.0)
    return [point for point in points if depth[int(point.y), int(point.x)] >= least]
