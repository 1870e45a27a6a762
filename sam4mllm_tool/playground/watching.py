"""A pipeline that reports intermediate results to a listener while a call runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields
from typing import Any

from sam4mllm_tool.concurrency import CallContext, call_context
from sam4mllm_tool.images.loading import ImageLike
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.points import Thresholds
from sam4mllm_tool.pipeline.results import Location
from sam4mllm_tool.types import Box, Point, PromptPoint, TargetCount

Event = dict[str, Any]
Listener = Callable[[Event], None]

_listener: ContextVar[Listener | None] = ContextVar("sam4mllm_playground", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report stages, boxes, points and answers to ``listener`` within the ``with`` block.

    Events are ``{"event": "stage", "name"}``, ``{"event": "boxes", "boxes"}``, ``{"event":
    "asking", "points"}`` and ``{"event": "answers", "points"}``; coordinates are pixels.
    """
    token = _listener.set(listener)
    try:
        with call_context(CallContext(lambda name: listener({"event": "stage", "name": name}))):
            yield
    finally:
        _listener.reset(token)


class WatchedModel(Sam4MLLM):
    """The pipeline, with its steps reported to the current listener; results are the same."""

    @classmethod
    def over(cls, model: Sam4MLLM) -> WatchedModel:
        """The same models and settings, with reports."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(model)})

    def locate(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
        *,
        alternates: int = 0,
    ) -> Location:
        """See :meth:`Sam4MLLM.locate`; the boxes are reported."""
        return _report_boxes(super().locate(image, expression, count, alternates=alternates))

    def locate_with_points(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
    ) -> Location:
        """See :meth:`Sam4MLLM.locate_with_points`; boxes and points are reported."""
        found = _report_boxes(super().locate_with_points(image, expression, count))
        for one in found.objects:
            _report({"event": "answers", "points": _points(one.points)})
        return found

    def check_points_of_each(
        self,
        image: ImageLike,
        location: Location,
        boxes: Sequence[Box],
        points: Sequence[Sequence[Point]] | None = None,
        *,
        thresholds: Thresholds | None = None,
    ) -> list[tuple[PromptPoint, ...]]:
        """See :meth:`Sam4MLLM.check_points_of_each`; reports the points, then the answers."""
        if points is None:
            points = [self.candidate_points(box, image) for box in boxes]
        listed = [{"x": point.x, "y": point.y} for some in points for point in some]
        _report({"event": "asking", "points": listed})
        answers = super().check_points_of_each(
            image, location, boxes, points, thresholds=thresholds
        )
        _report({"event": "answers", "points": [one for some in answers for one in _points(some)]})
        return answers


def _report_boxes(found: Location) -> Location:
    _report({"event": "boxes", "boxes": [list(one.box) for one in found.objects]})
    return found


def _points(points: Sequence[PromptPoint]) -> list[dict[str, Any]]:
    return [{**asdict(point), "label": point.label.value} for point in points]


def _report(event: Event) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(event)
