"""Lessons of stage 2: questions about a scene and their replies, as the dialogue's strings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt

from recipes.embedded_mllm.scenes import LABEL_SIDE, BaseScene, Reference
from sam4mllm_tool.datasets.vqa import BACKGROUND
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.geometry import box_iou, intersection, union_box
from sam4mllm_tool.pipeline.points import grid_points, poisson_disk_points
from sam4mllm_tool.types import Box, Point, TargetCount

UNIT = (1, 1)
"""Scenes give places as fractions of the sides, so every picture has the size 1 x 1."""
FORMAT = Sam4MllmFormat()
EDGE = 1 - 1e-6
PPG_POINTS = ((1, 0), (2, 1), (3, 1), (3, 2))
"""Numbers of points on and off the object that PPG lessons ask for."""


@dataclass(frozen=True)
class Turn:
    """A question and its reply; ``taught`` says whether the reply is part of the loss."""

    question: str
    reply: str
    taught: bool = True


@dataclass(frozen=True)
class Lesson:
    """A short conversation about one picture; ``topic`` names it in logs and measurements."""

    topic: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Plan:
    """Number of lessons of each topic per picture; a fraction is a probability."""

    boxes: float = 4
    absent: float = 1
    what: float = 1
    what_lists: float = 1
    points: float = 2
    verify: float = 1
    ppg: float = 0
    list_sizes: tuple[int, ...] = (2, 3, 5)
    hard: float = 0.0  # share of round 2's points off the object that are moved onto other ones
    shared: float = 0.0  # share of round 2's boxes that hold an overlapping object too
    jitter: float = 0.1  # most that an inexact box's edge moves, of its side
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "category": 1.5, "colour": 1.5, "function": 2.5, "size": 3.0, "position": 2.5,
            "ordinal": 5.0, "relation": 5.0, "plural": 3.0, "compound": 2.5, "negation": 5.0,
            "nearest": 5.5, "clauses": 5.0, "request": 1.5,
            "absent": 2.5, "contradicted": 5.0, "miscounted": 1.0,
        }
    )  # fmt: skip
    """Weight of each kind among those of a scene; for present and absent objects separately."""


TOPICS = (*Plan().kinds, "what", "what list", "points", "verify", "ppg")
"""Topics of lessons, as they are named in logs and measurements."""


class Teacher:
    """Draws lessons about scenes; the same random stream gives the same lessons."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def lessons(self, scene: BaseScene, plan: Plan) -> list[Lesson]:
        """Lessons about one scene, in random order."""
        makers: list[tuple[float, Callable[[BaseScene, Plan], Lesson | None]]] = [
            (plan.boxes, self.box),
            (plan.absent, self.absent),
            (plan.what, self.what),
            (plan.what_lists, self.what_list),
            (plan.points, self.points),
            (plan.verify, self.verify),
            (plan.ppg, self.ppg),
        ]
        lessons = []
        for count, make in makers:
            whole = int(count) + (self.rng.random() < count % 1)
            lessons += [lesson for _ in range(whole) if (lesson := make(scene, plan))]
        self.rng.shuffle(lessons)
        return lessons

    def box(self, scene: BaseScene, plan: Plan) -> Lesson | None:
        """Round 1 about an object that is in the picture."""
        reference = self._reference(scene, plan)
        if reference is None:
            return None
        return Lesson(
            reference.kind, (Turn(self._where(reference), boxes_reply(scene, reference)),)
        )

    def absent(self, scene: BaseScene, plan: Plan) -> Lesson | None:
        """Round 1 about an object that is not in the picture."""
        missing = self._reference(scene, plan, there=False)
        if missing is None:
            return None
        question = FORMAT.ask_boxes(missing.text, TargetCount.ZERO_OR_MORE, UNIT)
        return Lesson(missing.kind, (Turn(question, FORMAT.write_boxes([], UNIT)),))

    def what(self, scene: BaseScene, plan: Plan) -> Lesson:
        """What is at one point: the last word of an object's name, or "background"."""
        point, word = self._place(scene)
        return Lesson("what", (Turn(f"What is at {_written([point])}?", word),))

    def what_list(self, scene: BaseScene, plan: Plan) -> Lesson:
        """The same for several points at once."""
        drawn = [self._place(scene) for _ in range(self.rng.choice(plan.list_sizes))]
        question = f"What is at each point:\n{_written([point for point, _ in drawn])}"
        return Lesson("what list", (Turn(question, " ".join(word for _, word in drawn)),))

    def points(self, scene: BaseScene, plan: Plan) -> Lesson | None:
        """Both rounds, the second about one of the boxes of the first."""
        reference = self._reference(scene, plan)
        if reference is None:
            return None
        targets = left_to_right(scene, reference)
        chosen = self.rng.randrange(len(targets))
        boxes = [box_of(scene, target) for target in targets]
        exact = self.rng.random() < 0.4
        if not exact:
            boxes = [self._jitter(box, plan.jitter) for box in boxes]
        named_box = boxes[chosen]
        if exact and self.rng.random() < plan.shared:
            named_box = self._shared(scene, targets[chosen])
        asked = self._candidates(scene, targets[chosen], named_box, plan)
        inside = [scene.object_at(point.x, point.y) == targets[chosen] for point in asked]
        first = Turn(self._where(reference), FORMAT.write_boxes(boxes, UNIT), taught=exact)
        question = FORMAT.ask_points(reference.text, named_box, asked, UNIT)
        reply = "".join("Yes" if one else "No" for one in inside)
        return Lesson("points", (first, Turn(question, reply)))

    def verify(self, scene: BaseScene, plan: Plan) -> Lesson | None:
        """Whether a box shows the object of the expression; half of the boxes do not."""
        reference = self._reference(scene, plan)
        if reference is None or len(reference.targets) != 1:
            return None
        right = box_of(scene, reference.targets[0])
        box, answer = self._jitter(right), "Yes"
        if self.rng.random() < 0.5:
            box, answer = self._wrong_box(scene, reference), "No"
            if box_iou(box, right) > 0.4:
                return None
        question = FORMAT.ask_verification(reference.text, box, UNIT)
        return Lesson("verify", (Turn(question, answer),))

    def ppg(self, scene: BaseScene, plan: Plan) -> Lesson | None:
        """Box and prompt points in one reply: points well inside the object, and near but outside.

        One lesson in four is about an absent object, and its reply says so.
        """
        missing = self._reference(scene, plan, there=False)
        if missing is not None and self.rng.random() < 0.25:
            text, count = missing.text, TargetCount.ZERO_OR_MORE
            question = FORMAT.ask_box_and_points(text, count, *self.rng.choice(PPG_POINTS), UNIT)
            return Lesson("ppg", (Turn(question, FORMAT.write_boxes([], UNIT)),))
        reference = self._reference(scene, plan)
        if reference is None or len(reference.targets) != 1:
            return None
        target = reference.targets[0]
        box = box_of(scene, target)
        on, off = self.rng.choice(PPG_POINTS)
        spread = poisson_disk_points(_inside_picture(box), 60, self.rng, 0.12)
        inside = [p for p in spread if self._depth(scene, target, p) == 1]
        outside = [p for p in spread if self._depth(scene, target, p) == 0]
        away = distance_transform_edt(scene.labels != target + 1)  # farthest from the object first
        outside.sort(key=lambda p: -away[int(p.y * LABEL_SIDE), int(p.x * LABEL_SIDE)])
        if len(inside) < on or len(outside) < off:
            return None
        points = in_rows(inside[:on]) + in_rows(outside[:off])
        count = self._count(reference)
        question = FORMAT.ask_box_and_points(reference.text, count, on, off, UNIT)
        reply = FORMAT.write_boxes([box], UNIT)
        return Lesson("ppg", (Turn(question, f"{reply} {_written(points)}"),))

    def _reference(self, scene: BaseScene, plan: Plan, there: bool = True) -> Reference | None:
        """An expression for a present (or absent) object; its kind is drawn by weight."""
        candidates = [r for r in scene.references if bool(r.targets) == there]
        kinds = sorted({r.kind for r in candidates if plan.kinds.get(r.kind)})
        if not kinds:
            return None
        kind = self.rng.choices(kinds, [plan.kinds[kind] for kind in kinds])[0]
        return self.rng.choice([r for r in candidates if r.kind == kind])

    def _where(self, reference: Reference) -> str:
        return FORMAT.ask_boxes(reference.text, self._count(reference), UNIT)

    def _count(self, reference: Reference) -> TargetCount:
        counts = [TargetCount.ONE, TargetCount.ONE_OR_MORE, TargetCount.ZERO_OR_MORE]
        several = len(reference.targets) > 1
        return self.rng.choices(counts, [0.0 if several else 0.3, 0.3, 0.4])[0]

    def _shared(self, scene: BaseScene, target: int) -> Box:
        """A box around the object and one whose box overlaps, if there is one."""
        box, others = box_of(scene, target), range(len(scene.things))
        near = [box_of(scene, n) for n in others if n != target]
        near = [other for other in near if intersection(box, other)]
        return union_box((box, self.rng.choice(near))) if near else box

    def _jitter(self, box: Box, share: float = 0.1) -> Box:
        """The box with its edges moved by up to a fraction ``share`` of its size."""

        def move(size: float) -> float:
            return self.rng.triangular(-share, share) * size

        return Box(
            min(max(box.x_min + move(box.width), 0.0), EDGE),
            min(max(box.y_min + move(box.height), 0.0), EDGE),
            min(max(box.x_max + move(box.width), 0.0), EDGE),
            min(max(box.y_max + move(box.height), 0.0), EDGE),
        )

    def _wrong_box(self, scene: BaseScene, reference: Reference) -> Box:
        others = [n for n in range(len(scene.things)) if n not in reference.targets]
        if others and self.rng.random() < 0.7:
            return self._jitter(box_of(scene, self.rng.choice(others)))
        right = box_of(scene, reference.targets[0])
        x, y = self.rng.uniform(0, 1 - right.width), self.rng.uniform(0, 1 - right.height)
        return Box(x, y, min(x + right.width, EDGE), min(y + right.height, EDGE))

    def _candidates(self, scene: BaseScene, target: int, box: Box, plan: Plan) -> list[Point]:
        """Candidate points: a grid as in the pipeline, or random ones."""
        count = self.rng.choice(plan.list_sizes)
        draw = self.rng.random()
        if draw < 0.55:
            points = [_clamped(point) for point in grid_points(box, count)]
        else:
            points = [_clamped(p) for p in poisson_disk_points(box, count, self.rng, 0.1)]
        points = self._hardened(scene, target, box, points, plan.hard)
        if 0.55 <= draw < 0.7:
            points = in_rows(points)
        return points or [_clamped(point) for point in grid_points(box, 1)]

    def _hardened(
        self, scene: BaseScene, target: int, box: Box, points: list[Point], share: float
    ) -> list[Point]:
        """The points; some of those off the target are moved onto other objects in the box."""
        x0, y0, x1, y1 = (int(edge * LABEL_SIDE) for edge in box)
        window = scene.labels[y0 : y1 + 1, x0 : x1 + 1]
        places = np.argwhere((window > 0) & (window != target + 1))
        if not len(places):
            return points
        moved = list(points)
        for number, point in enumerate(points):
            if scene.object_at(point.x, point.y) != target and self.rng.random() < share:
                row, column = self.rng.choice(places)
                moved[number] = Point(
                    (x0 + column + self.rng.random()) / LABEL_SIDE,
                    (y0 + row + self.rng.random()) / LABEL_SIDE,
                )
        return moved

    def _place(self, scene: BaseScene) -> tuple[Point, str]:
        """A point and the word for it: 70 % lie in some object's box, the rest anywhere."""
        x, y = self.rng.random(), self.rng.random()
        if self.rng.random() < 0.7:
            box = self.rng.choice(scene.things).box
            x, y = box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1])
        found = scene.object_at(x, y)
        word = scene.things[found].name.split()[-1] if found >= 0 else BACKGROUND
        return _clamped(Point(x, y)), word

    def _depth(self, scene: BaseScene, target: int, point: Point) -> float:
        """Fraction of a small cross around the point that lies on the target."""
        reach = 0.012
        around = [(0, 0), (reach, 0), (-reach, 0), (0, reach), (0, -reach)]
        near = [_clamped(Point(point.x + dx, point.y + dy)) for dx, dy in around]
        return sum(scene.object_at(*place) == target for place in near) / len(near)


def box_of(scene: BaseScene, number: int) -> Box:
    """Box of an object, in fractions of the sides."""
    return Box(*scene.things[number].box)


def left_to_right(scene: BaseScene, reference: Reference) -> list[int]:
    """The targets in the order in which replies list them."""
    return sorted(reference.targets, key=lambda n: (scene.things[n].box[0], scene.things[n].box[1]))


def boxes_reply(scene: BaseScene, reference: Reference) -> str:
    """Round 1's reply: the targets' boxes from left to right."""
    return FORMAT.write_boxes([box_of(scene, n) for n in left_to_right(scene, reference)], UNIT)


def in_rows(points: Sequence[Point]) -> list[Point]:
    """Points from top to bottom in bands, each band from left to right."""
    return sorted(points, key=lambda p: (math.floor(p.y * 8), p.x))


def _written(points: Sequence[Point]) -> str:
    """Points as the text of round 2."""
    return FORMAT.ask_points("", Box(0, 0, 1, 1), points, UNIT).split("\n", 1)[1]


def _inside_picture(box: Box) -> Box:
    pad_x, pad_y = 0.08 * box.width, 0.08 * box.height
    return Box(
        max(box.x_min - pad_x, 0.0), max(box.y_min - pad_y, 0.0),
        min(box.x_max + pad_x, EDGE), min(box.y_max + pad_y, EDGE),
    )  # fmt: skip


def _clamped(point: Point) -> Point:
    return Point(min(max(point.x, 0.0), EDGE), min(max(point.y, 0.0), EDGE))
