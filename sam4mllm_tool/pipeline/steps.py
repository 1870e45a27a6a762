"""The steps of the dialogue: locate, ask about points, draw. Each is a method; state is passed on.

SAM4MLLM's PQPP dialogue (ECCV 2024, arXiv 2409.10542): round 1 asks for a box, round 2 whether
points lie on the object, SAM draws the mask. ``strategies.py`` puts the steps together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from sam4mllm_tool.concurrency import stage
from sam4mllm_tool.drawing.marks import draw_marks
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats import DialogueFormat, get_format
from sam4mllm_tool.geometry import clip_box
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.images.loading import ImageLike, to_rgb_image
from sam4mllm_tool.pipeline.faults import (
    checked_answers,
    checked_masks,
    checked_replies,
    typed_faults,
)
from sam4mllm_tool.pipeline.points import (
    Thresholds,
    candidate_points,
    label_point,
)
from sam4mllm_tool.pipeline.reading import read_expression
from sam4mllm_tool.pipeline.results import LocatedObject, Location, ScoredBox, Settings
from sam4mllm_tool.pipeline.validation import check_count, check_expression, check_image_points
from sam4mllm_tool.pipeline.verification import ANSWERS, posterior
from sam4mllm_tool.protocols import (
    Dialogue,
    MaskCandidate,
    Mllm,
    Proposer,
    Question,
    Reply,
    Segmenter,
    SegmentPrompt,
    Turn,
    Verification,
    answer_each,
    sample_replies,
)
from sam4mllm_tool.types import (
    Box,
    Mask,
    Point,
    PointLabel,
    PromptPoint,
    RgbImage,
    TargetCount,
    YesNo,
)

T = TypeVar("T")


@dataclass(frozen=True)
class DialogueSteps:
    """Two models and the steps of the dialogue between them.

    With a ``proposer`` the strategy ``propose`` takes its candidates from that, else from the MLLM.
    Images are anything that :func:`~sam4mllm_tool.load_image` reads, or what it returns;
    coordinates are pixels of the upright image. Safe to share between threads as far as the two
    backends are (ours are).
    """

    mllm: Mllm
    segmenter: Segmenter
    settings: Settings = field(default_factory=Settings)
    format: DialogueFormat | None = None
    proposer: Proposer | None = None

    @property
    def speech(self) -> DialogueFormat:
        """The dialogue format in use: the one given, else the checkpoint's own."""
        return self.format or get_format(self.mllm.format_name)

    def locate(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
        *,
        alternates: int = 0,
    ) -> Location:
        """Round 1: the box(es) the expression means, each with up to ``alternates`` others.

        Raises:
            ExpressionError: empty or overlong expression.
            InputError: unknown ``count``.
            ImageError, AccessDenied: see :func:`~sam4mllm_tool.load_image`.
            DialogueError: the reply could not be read.
        """
        image, count, text = to_rgb_image(image), check_count(count), check_expression(expression)
        stage("locate")
        verified = self.settings.verified_boxes
        alternates = max(alternates, verified - 1)
        dialogue, grammar = self._where(image, text, count)
        best, *others = self._replies(image, dialogue, grammar, alternates)
        read = self.speech.read_boxes(best.text, image.size)
        boxes = read.boxes[:1] if count is TargetCount.ONE else read.boxes
        # A free reply may hold several boxes where one was asked for: the rest are alternates.
        spare = tuple(ScoredBox(box) for box in read.boxes[len(boxes) :])
        other_boxes = spare + self._other_boxes(others, image, boxes)
        belief = self._belief(best)
        found = tuple(LocatedObject(box, *belief, other_boxes) for box in boxes)
        notes = (*read.notes, *self._notes(text))
        spoken = (*dialogue, Turn("assistant", best.text))
        location = Location(text, count, spoken, found, notes, image)
        return self._surest(image, location) if verified > 1 else location

    def locate_with_points(
        self,
        image: ImageLike,
        expression: str,
        count: TargetCount | str = TargetCount.ZERO_OR_MORE,
    ) -> Location:
        """PPG: box(es) and labelled points in one reply. Raises as :meth:`locate`."""
        image, count, text = to_rgb_image(image), check_count(count), check_expression(expression)
        stage("locate")
        n_in, n_out = self.settings.positive, self.settings.negative
        wording = self._wording(text)
        question = self.speech.ask_box_and_points(wording, count, n_in, n_out, image.size)
        grammar = self.speech.box_and_points_grammar(count, n_in, n_out)
        dialogue = self._opening(question)
        (reply,) = self._replies(image, dialogue, grammar)
        read = self.speech.read_box_and_points(reply.text, n_in, n_out, image.size)
        belief = self._belief(reply)
        found = tuple(LocatedObject(r.box, *belief, (), r.points) for r in read)
        found = found[:1] if count is TargetCount.ONE else found
        spoken = (*dialogue, Turn("assistant", reply.text))
        return Location(text, count, spoken, found, self._notes(text), image)

    def stated(self, image: ImageLike, expression: str, *boxes: Box) -> Location:
        """A location as if the MLLM had answered with these boxes, so that round 2 can follow."""
        image, text = to_rgb_image(image), check_expression(expression)
        count = TargetCount.ONE if len(boxes) == 1 else TargetCount.ZERO_OR_MORE
        question = self.speech.ask_boxes(self._wording(text), count, image.size)
        reply = self.speech.write_boxes(boxes, image.size)
        dialogue = (*self._opening(question), Turn("assistant", reply))
        found = tuple(LocatedObject(box) for box in boxes)
        return Location(text, count, dialogue, found, self._notes(text), image)

    def candidate_points(self, box: Box, image: ImageLike) -> list[Point]:
        """The points to ask about: spread over the part of the box inside the image.

        Raises:
            InputError: the settings name no known pattern.
        """
        image = to_rgb_image(image)
        inside = clip_box(box, image.width, image.height)
        return candidate_points(self.settings.candidates, inside, self.settings.points)

    def check_points(
        self,
        image: ImageLike,
        location: Location,
        box: Box,
        points: Sequence[Point] | None = None,
        *,
        thresholds: Thresholds | None = None,
    ) -> tuple[PromptPoint, ...]:
        """Round 2: is each point on the object? The standard candidate points if none are given.

        A point given twice is asked about once. Answers come in the order of ``points``.

        Raises:
            PointOutsideImage, PromptError: points outside, not finite, or too many.
        """
        (found,) = self.check_points_of_each(
            image, location, [box], None if points is None else [points], thresholds=thresholds
        )
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
        """Round 2 for several boxes, all of it asked at once; as :meth:`check_points` for each."""
        image = to_rgb_image(image)
        if not boxes:
            return []
        stage("points")
        if points is None:
            points = [self.candidate_points(box, image) for box in boxes]
        asked = [list(some) for some in points]
        for some in asked:
            check_image_points(some, image)
        different = [list(dict.fromkeys(some)) for some in asked]
        asking = self.settings.point_asking or self.speech.point_asking
        ask = self._mark_questions if asking == "marks" else self._coordinate_questions
        questions = [
            list(ask(image, location, box, some))
            for box, some in zip(boxes, different, strict=True)
        ]
        answers = iter(self._yes_no([one for some in questions for one in some]))
        limits = thresholds or self.settings.thresholds
        checked: list[tuple[PromptPoint, ...]] = []
        for listed, some, theirs in zip(asked, different, questions, strict=True):
            said = [answer for _ in theirs for answer in next(answers)]
            known = {
                point: PromptPoint(*point, label_point(answer, limits), answer.p_yes, answer.p_no)
                for point, answer in zip(some, said, strict=True)
            }
            checked.append(tuple(known[point] for point in listed))
        return checked

    def _coordinate_questions(
        self, image: RgbImage, location: Location, box: Box, points: Sequence[Point]
    ) -> Iterator[Question]:
        """Round 2 as in the paper: it continues the dialogue of round 1."""
        wording = self._wording(location.expression)
        for some in batched(points, self._longest_list):
            question = self.speech.ask_points(wording, box, some, image.size)
            yield Question(image, (*location.dialogue, Turn("user", question)), len(some))

    def _mark_questions(
        self, image: RgbImage, location: Location, box: Box, points: Sequence[Point]
    ) -> Iterator[Question]:
        """Round 2 on a copy of the picture with numbered marks, which is a dialogue of its own."""
        marked = draw_marks(image, points, box)
        wording = self._wording(location.expression)
        for some in batched(range(1, len(points) + 1), self._longest_list):
            question = self.speech.ask_marks(wording, some)
            yield Question(marked, self._opening(question), len(some))

    def _yes_no(self, questions: Sequence[Question]) -> Sequence[Sequence[YesNo]]:
        with typed_faults(self.mllm.name):
            answers = checked_answers(
                answer_each(self.mllm, questions, words=self.speech.yes_no), len(questions)
            )
        for question, some in zip(questions, answers, strict=True):
            if len(some) != question.count:
                raise DialogueError(
                    f"{len(some)} answers came back for {question.count} points",
                    raw_reply="".join("Yes" if a.p_yes >= a.p_no else "No" for a in some),
                    hint="Ask about fewer points at a time.",
                )
        return answers

    def verify(self, image: ImageLike, expression: str, boxes: Sequence[Box]) -> list[YesNo]:
        """For each box, the probability that its region shows what the expression describes.

        Either from the answer to that question, or from the MLLM's own answers to where it is
        (:mod:`sam4mllm_tool.pipeline.verification`), as settings or checkpoint say.

        Raises:
            InputError: the settings name the second way, and the MLLM cannot sample replies.
        """
        image, text = to_rgb_image(image), check_expression(expression)
        stage("verify")
        if not boxes:
            return []
        if self.verification == "posterior":
            return posterior(self._sampled(image, text), boxes)
        wording = self._wording(text)
        asked = [self.speech.ask_verification(wording, box, image.size) for box in boxes]
        questions = [Question(image, self._opening(question)) for question in asked]
        return [answer for (answer,) in self._yes_no(questions)]

    @property
    def verification(self) -> Verification:
        """How boxes are verified: as the settings say, else as suits the checkpoint."""
        return self.settings.verification or self.mllm.notes.verification

    def _sampled(self, image: RgbImage, expression: str) -> list[tuple[Box, ...]]:
        """The boxes of round 1's replies, drawn as often as the MLLM would give them."""
        dialogue, grammar = self._where(image, expression, TargetCount.ZERO_OR_MORE)
        with typed_faults(self.mllm.name):
            drawn = checked_replies(
                sample_replies(self.mllm, image, dialogue, grammar=grammar, count=ANSWERS)
            )
        read = {one.text: self.speech.read_boxes(one.text, image.size).boxes for one in drawn}
        return [read[one.text] for one in drawn]

    def _surest(self, image: RgbImage, location: Location) -> Location:
        """The location with the candidate box that verification is surest of."""
        if len(location.objects) != 1 or not location.objects[0].alternates:
            return location
        first = location.objects[0]
        candidates = [ScoredBox(first.box, first.score, first.likelihood), *first.alternates]
        answers = self.verify(image, location.expression, [c.box for c in candidates])
        ranked = sorted(
            zip(candidates, answers, strict=True), key=lambda pair: pair[1].p_yes, reverse=True
        )
        (best, _), *others = ranked
        reply = self.speech.write_boxes([best.box], image.size)
        return replace(
            location,
            dialogue=(*location.dialogue[:-1], Turn("assistant", reply)),
            objects=(
                LocatedObject(
                    best.box, best.score, best.likelihood, tuple(other for other, _ in others)
                ),
            ),
        )

    def draw(self, image: ImageLike, prompts: Sequence[SegmentPrompt]) -> list[MaskCandidate]:
        """Box and confident points → the chosen one of SAM's three masks, for each prompt."""
        candidates = self.draw_all(image, prompts)
        return [
            choose_mask(some, prompt.points, self.settings.choose_by)
            for some, prompt in zip(candidates, prompts, strict=True)
        ]

    def draw_all(
        self, image: ImageLike, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """All of SAM's masks for each prompt, boxes clipped to the image."""
        image = to_rgb_image(image)
        stage("mask")
        clipped = [replace(p, box=_clip(p.box, image)) for p in prompts]
        with typed_faults(self.segmenter.name):
            masks = checked_masks(self.segmenter.predict(image, clipped), image, len(clipped))
        return [tuple(some) for some in masks]

    def embed(self, image: ImageLike) -> None:
        """Have the segmenter look at the image, which takes long, before it draws masks."""
        image = to_rgb_image(image)
        stage("image embedding")
        with typed_faults(self.segmenter.name):
            self.segmenter.embed(image)

    def _replies(
        self, image: RgbImage, dialogue: Dialogue, grammar: Grammar | None, alternates: int = 0
    ) -> Sequence[Reply]:
        """The reply, and likely others if they are wanted and the format has a grammar."""
        with typed_faults(self.mllm.name):
            if alternates and grammar is not None:
                return checked_replies(
                    self.mllm.alternates(image, dialogue, grammar=grammar, count=alternates + 1)
                )
            return checked_replies([self.mllm.generate(image, dialogue, grammar=grammar)])

    def _where(
        self, image: RgbImage, text: str, count: TargetCount
    ) -> tuple[Dialogue, Grammar | None]:
        """Round 1's question, and what its reply may be."""
        question = self.speech.ask_boxes(self._wording(text), count, image.size)
        return self._opening(question), self.speech.box_grammar(count)

    def _opening(self, question: str) -> Dialogue:
        system = self.speech.system_prompt
        first = (Turn("system", system),) if system else ()
        return (*first, Turn("user", question))

    def _other_boxes(
        self, replies: Sequence[Reply], image: RgbImage, taken: Sequence[Box]
    ) -> tuple[ScoredBox, ...]:
        others: dict[Box, ScoredBox] = {}
        for reply in replies:
            for box in self.speech.read_boxes(reply.text, image.size).boxes[:1]:
                if box not in taken:
                    others.setdefault(box, ScoredBox(box, *self._belief(reply)))
        return tuple(others.values())

    def _belief(self, reply: Reply) -> tuple[float | None, float | None]:
        """Calibrated score and likelihood of the boxes in a reply."""
        if reply.log_probability is None or not reply.tokens:
            return None, None
        likelihood = math.exp(reply.log_probability / reply.tokens)
        return self.mllm.notes.box_probability(likelihood), likelihood

    @property
    def _longest_list(self) -> int:
        """Most points in one question: what the format allows and the checkpoint was taught."""
        taught = self.mllm.notes.points_per_question
        allowed = self.speech.points_per_question
        return allowed if taught is None else min(allowed, taught)

    def _wording(self, expression: str) -> str:
        """The expression as the checkpoint was taught to read it."""
        return read_expression(expression, self.mllm.notes).text

    def _notes(self, expression: str) -> tuple[str, ...]:
        """What a reader should know: of the checkpoint, and of words it was not taught."""
        return read_expression(expression, self.mllm.notes).notes


def agreement(mask: Mask, points: Sequence[PromptPoint]) -> float:
    """Share of the foreground and background points that the mask agrees with, 1 if none."""
    sure = [p for p in points if p.label is not PointLabel.UNDECIDED]
    agreeing = [mask.contains(p.x, p.y) == (p.label is PointLabel.FOREGROUND) for p in sure]
    return sum(agreeing) / len(sure) if sure else 1.0


def choose_mask(
    candidates: Sequence[MaskCandidate],
    points: Sequence[PromptPoint],
    choose_by: Literal["predicted_iou", "agreement"] = "predicted_iou",
) -> MaskCandidate:
    """One of SAM's masks for a prompt: the first of the best ones."""
    if choose_by == "predicted_iou":
        return max(candidates, key=lambda c: c.predicted_iou)
    return max(candidates, key=lambda c: c.predicted_iou + agreement(c.mask, points))


def _clip(box: Box | None, image: RgbImage) -> Box | None:
    return None if box is None else clip_box(box, image.width, image.height)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most ``size`` items (``itertools.batched`` needs Python 3.12)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
