"""The masks that other answers about the same points, or less exact boxes, would give."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.outcome import Outcome, compare_masks
from sam4mllm_tool.evaluation.places import Place, Places
from sam4mllm_tool.images.loading import ImageLike
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.points import Thresholds, label_point
from sam4mllm_tool.pipeline.results import Location, Segmentation
from sam4mllm_tool.protocols import SegmentPrompt, Turn
from sam4mllm_tool.training.candidates import jittered
from sam4mllm_tool.types import PointLabel, PromptPoint, RgbImage, TargetCount, YesNo

Rule = Callable[[Place | None, PointLabel, PointLabel], PointLabel]


@dataclass(frozen=True)
class LooseBoxes(Sam4MLLM):
    """Models whose round 1 is less exact: each edge moves by up to ``share`` of its side.

    The moves depend on the picture and the expression alone, so that every setting gets the same
    boxes. The dialogue continues as if the MLLM had answered with them.
    """

    share: float = 0.0

    def locate(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
        *,
        alternates: int = 0,
    ) -> Location:
        """Round 1, its boxes moved."""
        return self._loosened(
            image, super().locate(image, expression, count, alternates=alternates)
        )

    def locate_with_points(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
    ) -> Location:
        """PPG, its boxes moved and its points as they are."""
        return self._loosened(image, super().locate_with_points(image, expression, count))

    def _loosened(self, image: ImageLike, location: Location) -> Location:
        assert isinstance(image, RgbImage)
        if not self.share or not location.objects:
            return location
        rng = random.Random(f"{image.digest}/{location.expression}")
        objects = tuple(
            replace(found, box=jittered(found.box, self.share, image.size, rng))
            for found in location.objects
        )
        reply = self.speech.write_boxes([found.box for found in objects], image.size)
        dialogue = (*location.dialogue[:-1], Turn("assistant", reply))
        return replace(location, dialogue=dialogue, objects=objects)


class Truth:
    """A case's truth about points."""

    def __init__(self, case: Case) -> None:
        self._masks = case.truth()
        self._places = Places(self._masks, case.others()) if self._masks else None

    def label(self, point: PromptPoint) -> PointLabel:
        """What a point is."""
        inside = any(mask.contains(point.x, point.y) for mask in self._masks)
        return PointLabel.FOREGROUND if inside else PointLabel.BACKGROUND

    def place(self, point: PromptPoint) -> Place | None:
        """Where a point lies; ``None`` where there is no target."""
        return self._places.of(point.x, point.y) if self._places else None


RULES: dict[str, Rule] = {
    "neighbours corrected": lambda place, got, true: true if place == "other" else got,
    "edges corrected": lambda place, got, true: true if place == "outline" else got,
    "wrong answers dropped": lambda _, answer, true: (
        answer if answer is true else PointLabel.UNDECIDED
    ),
    "all true": lambda _, got, true: true,
}
"""Which label is shown, from where the point lies, what the answer made of it, and its true one."""


def relabelled(
    model: Sam4MLLM, image: RgbImage, case: Case, found: Segmentation
) -> Iterator[tuple[str, Outcome]]:
    """Outcomes of other labels on the points that ``found`` was drawn with, by rule."""
    truth = Truth(case)
    for name, rule in RULES.items():

        def label(point: PromptPoint, rule: Rule = rule) -> PointLabel:
            return rule(truth.place(point), point.label, truth.label(point))

        yield name, _drawn_anew(model, image, case, found, label)


def thresholded(
    model: Sam4MLLM, image: RgbImage, case: Case, found: Segmentation, thresholds: Thresholds
) -> Outcome:
    """The outcome with other thresholds for the same answers."""

    def label(point: PromptPoint) -> PointLabel:
        assert point.p_yes is not None and point.p_no is not None
        return label_point(YesNo(point.p_yes, point.p_no), thresholds)

    return _drawn_anew(model, image, case, found, label)


def _drawn_anew(
    model: Sam4MLLM,
    image: RgbImage,
    case: Case,
    found: Segmentation,
    label: Callable[[PromptPoint], PointLabel],
) -> Outcome:
    prompts = [
        SegmentPrompt(one.located.box, tuple(replace(p, label=label(p)) for p in one.points))
        for one in found.objects
    ]
    masks = [drawn.mask for drawn in model.draw(image, prompts)] if prompts else []
    return Outcome(case.case, case.image, *compare_masks(masks, case.truth(), case.ignore()))


def pooled(outcomes: Sequence[tuple[int, Outcome]]) -> list[Outcome]:
    """Outcomes of several seeds as of one run: cases and pictures of different seeds differ."""
    return [
        replace(one, case=f"{seed}/{one.case}", image=f"{seed}/{one.image}")
        for seed, one in outcomes
    ]
