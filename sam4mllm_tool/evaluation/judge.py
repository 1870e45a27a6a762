"""One expression through the real pipeline, compared with its truth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.outcome import (
    Outcome,
    PointOutcome,
    StatedPoint,
    compare_masks,
    match_boxes,
)
from sam4mllm_tool.evaluation.places import Places
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Segmentation
from sam4mllm_tool.types import Mask, PointLabel, RgbImage, TargetCount


@dataclass(frozen=True)
class Judged:
    """An outcome with what was predicted, for pictures, and what went wrong, if anything."""

    outcome: Outcome
    expression: str
    masks: tuple[dict[str, Any], ...]
    error: str = ""


def judge(model: Sam4MLLM, case: Case, image: RgbImage) -> Judged:
    """Ask, draw, compare. A reply that cannot be read counts as an empty prediction."""
    error = ""
    start = time.perf_counter()
    found: Segmentation | None = None
    try:
        found = model.segment(image, case.expression, count=case.count)
    except DialogueError as failure:
        error = str(failure)
    seconds = time.perf_counter() - start
    outcome = replace(outcome_of(found, case), seconds=seconds)
    if _apart(case):
        outcome = replace(outcome, said_target=_says_target(model, case, image))
    masks = tuple(one.mask.to_rle() for one in found.objects) if found else ()
    return Judged(outcome, case.expression, masks, error)


def outcome_of(found: Segmentation | None, case: Case) -> Outcome:
    """What was found (``None``: the reply could not be read), compared with the case's truth."""
    truth = case.truth()
    objects = found.objects if found else ()
    return Outcome(
        case.case,
        case.image,
        *_compare(case, [one.mask for one in objects], truth),
        box_iou=match_boxes([one.located.box for one in objects], case.boxes),
        points=_points(found, truth, case.others()) if found and truth else (),
        stated=_stated(found, truth) if found and truth else (),
        said_target=bool(objects) if case.decides else None,
        decides=case.decides,
        questions=_questions(found) if found else 1,
        kind=case.kind,
    )


def _points(
    found: Segmentation, truth: Sequence[Mask], others: Sequence[Mask] | None
) -> tuple[PointOutcome, ...]:
    """Answered points (PPG's are stated, not answered) against the targets' union."""
    judged, places = [], Places(truth, others)
    for one in found.objects:
        box = one.located.box
        for point in one.points:
            if point.p_yes is not None and point.p_no is not None:
                inside = any(mask.contains(point.x, point.y) for mask in truth)
                u = (point.x - box.x_min) / max(box.width, 1e-9)
                v = (point.y - box.y_min) / max(box.height, 1e-9)
                place = places.of(point.x, point.y)
                judged.append(PointOutcome(point.p_yes, point.p_no, inside, u, v, place))
    return tuple(judged)


def _stated(found: Segmentation, truth: Sequence[Mask]) -> tuple[StatedPoint, ...]:
    """PPG's points, which were not asked about, against the targets' union."""
    return tuple(
        StatedPoint(
            point.label is PointLabel.FOREGROUND,
            any(mask.contains(point.x, point.y) for mask in truth),
        )
        for one in found.objects
        for point in one.points
        if point.p_yes is None
    )


def _questions(found: Segmentation) -> int:
    """Each point asked about counts as a question, however many are in one message."""
    return sum(one.count if one.kind == "yes_no" else 1 for one in found.trace.exchanges)


def _compare(case: Case, masks: Sequence[Mask], truth: Sequence[Mask]) -> tuple[int, int, int]:
    """(intersection, truth area, predicted area) at the size the case is compared at."""
    if case.scored is None or case.scored_size is None:
        return compare_masks(masks, truth, case.ignore())
    return compare_masks([mask.resized(case.scored_size) for mask in masks], case.scored())


def _apart(case: Case) -> bool:
    """Whether presence needs a question of its own; with "0+" the first question covers it."""
    return case.ask_presence and case.count is not TargetCount.ZERO_OR_MORE


def _says_target(model: Sam4MLLM, case: Case, image: RgbImage) -> bool:
    """Whether the model, allowed to say that nothing is there, says that something is."""
    try:
        return bool(model.locate(image, case.expression, TargetCount.ZERO_OR_MORE).objects)
    except DialogueError:
        return False
