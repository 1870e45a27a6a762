"""THE flow: image + expression → box → candidate points → answers → prompt points → mask.

SAM4MLLM's PQPP dialogue (ECCV 2024, arXiv 2409.10542) and short variations of it. A
:class:`Sam4MLLM` holds two models and settings and nothing else; all state passes as values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from sam4mllm_tool import embedded
from sam4mllm_tool.concurrency import stage
from sam4mllm_tool.drawing.marks import draw_marks
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats import DialogueFormat, get_format
from sam4mllm_tool.geometry import clip_box
from sam4mllm_tool.mllm import is_address, load_mllm
from sam4mllm_tool.pipeline.points import (
    Thresholds,
    grid_points,
    jittered_points,
    label_point,
    poisson_disk_points,
    uncertain_points,
)
from sam4mllm_tool.pipeline.results import (
    LocatedObject,
    Location,
    ScoredBox,
    Segmentation,
    SegmentedObject,
    Settings,
)
from sam4mllm_tool.pipeline.trace import (
    Recorder,
    RecordingMllm,
    RecordingSegmenter,
    ReplayMllm,
    Trace,
)
from sam4mllm_tool.pipeline.validation import check_expression, check_image_points
from sam4mllm_tool.protocols import (
    Dialogue,
    MaskCandidate,
    Mllm,
    Reply,
    Segmenter,
    SegmentPrompt,
    Taught,
    Turn,
)
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.types import (
    Box,
    Mask,
    Point,
    PointLabel,
    PromptPoint,
    RgbImage,
    Strategy,
    TargetCount,
    YesNo,
)

__all__ = [
    "LocatedObject",
    "Location",
    "Sam4MLLM",
    "ScoredBox",
    "Segmentation",
    "SegmentedObject",
    "Settings",
    "agreement",
    "choose_mask",
    "replay",
]

T = TypeVar("T")
ROOM_FOR_SEGMENTER = 1 << 30
"""Bytes that an MLLM on the same device leaves for the segmenter's activations and embeddings."""


@dataclass(frozen=True)
class Sam4MLLM:
    """Two models and the dialogue between them.

    Methods take an :class:`~sam4mllm_tool.types.RgbImage`; coordinates are its pixels. Safe to
    share between threads as far as the two backends are (ours are).
    """

    mllm: Mllm
    segmenter: Segmenter
    settings: Settings = field(default_factory=Settings)
    format: DialogueFormat | None = None

    @classmethod
    def from_pretrained(
        cls,
        mllm: str = embedded.NAME,
        *,
        adapter: str | None = None,
        segmenter: str = embedded.NAME,
        device: str = "auto",
        dtype: str = "auto",
        format: str | None = None,
        settings: Settings | None = None,
        segmenter_options: Mapping[str, Any] | None = None,
        **mllm_options: Any,
    ) -> Sam4MLLM:
        """Load an MLLM (with an optional PEFT adapter) and a segmenter by name.

        Args:
            mllm: ``"embedded"`` (with an adapter: the base it was trained over), a directory or
                hub id of a transformers image-text-to-text model, or the address of an
                OpenAI-compatible server (``http://host:8000/v1``).
            adapter: directory or hub id of a PEFT adapter over it.
            segmenter: ``"embedded"``, a checkpoint file of segment-anything or
                EfficientViT-SAM, or a directory or hub id of a transformers SAM family.
            device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
            dtype: ``"auto"`` (bfloat16 on CUDA, else float32), or a torch dtype name.
            format: name of a dialogue format, if the checkpoint's own should not be used.
            settings: how the dialogue is held.
            segmenter_options: passed on to ``load_segmenter``: ``decoder`` (a file of fine-tuned
                weights laid over the segmenter's), ``dtype`` (of its image encoder).
            mllm_options: passed on to ``LocalMllm.from_pretrained`` or ``OpenAIEndpointMllm``.

        Raises:
            CheckpointError: a checkpoint is missing, corrupt or of the wrong kind.
            DeviceOutOfMemory: the device is too small for it.
            EndpointError: the server cannot be reached.
        """
        # First the segmenter: what the MLLM's check of memory finds is what is left beside it.
        drawer = load_segmenter(segmenter, device=device, **(segmenter_options or {}))
        if not is_address(mllm):
            reserve = {"reserve_bytes": ROOM_FOR_SEGMENTER}
            mllm_options = {"device": device, "dtype": dtype, **reserve, **mllm_options}
        talker = load_mllm(mllm, adapter=adapter, **mllm_options)
        return cls(
            mllm=talker,
            segmenter=drawer,
            settings=settings or Settings(),
            format=get_format(format) if format else talker.own_format,
        )

    @property
    def speech(self) -> DialogueFormat:
        """The dialogue format in use: the one given, else the checkpoint's own."""
        return self.format or get_format(self.mllm.format_name)

    def segment(
        self,
        image: RgbImage,
        expression: str,
        *,
        count: TargetCount = TargetCount.ONE,
        source: str = "",
    ) -> Segmentation:
        """Expression → mask(s), by the strategy of the settings.

        Raises:
            ExpressionError: empty or overlong expression.
            DialogueError: a reply that could not be read.
        """
        recorder = Recorder()
        run = replace(
            self,
            mllm=RecordingMllm(self.mllm, recorder),
            segmenter=RecordingSegmenter(self.segmenter, recorder),
        )
        location, objects = run._flow(image, expression, count)
        trace = _trace(self, recorder, image, source, location, objects)
        return Segmentation(location, objects, trace)

    def _flow(
        self, image: RgbImage, expression: str, count: TargetCount
    ) -> tuple[Location, tuple[SegmentedObject, ...]]:
        """Locate, ask about points, draw."""
        strategy = self.settings.strategy
        locate = self.locate_with_points if strategy is Strategy.PPG else self.locate
        location = locate(image, expression, count)
        if not location.objects:
            return location, ()
        stage("image embedding")
        self.segmenter.embed(image)
        if strategy is Strategy.ADAPTIVE:
            return location, tuple(self._adapt(image, location, o) for o in location.objects)
        points = [found.points for found in location.objects]
        if strategy is Strategy.PQPP:
            points = [self.check_points(image, location, o.box) for o in location.objects]
        prompts = [
            SegmentPrompt(found.box, some)
            for found, some in zip(location.objects, points, strict=True)
        ]
        drawn = self.draw(image, prompts)
        parts = zip(location.objects, points, drawn, strict=True)
        return location, tuple(SegmentedObject(*part) for part in parts)

    def locate(
        self,
        image: RgbImage,
        expression: str,
        count: TargetCount = TargetCount.ONE,
        *,
        alternates: int = 0,
    ) -> Location:
        """Round 1: the box(es) the expression means, each with up to ``alternates`` others."""
        stage("locate")
        verified = self.settings.verified_boxes if count is TargetCount.ONE else 0
        alternates = max(alternates, verified - 1)
        text = self._asked(expression)
        question = self.speech.ask_boxes(text, count, image.size)
        grammar = self.speech.box_grammar(count)
        dialogue = self._opening(question)
        if alternates and grammar is not None:
            best, *others = self.mllm.alternates(
                image, dialogue, grammar=grammar, count=alternates + 1
            )
        else:
            best, others = self.mllm.generate(image, dialogue, grammar=grammar), []
        read = self.speech.read_boxes(best.text, image.size)
        boxes = read.boxes[:1] if count is TargetCount.ONE else read.boxes
        # A free reply may hold several boxes where one was asked for: the rest are alternates.
        spare = tuple(ScoredBox(box) for box in read.boxes[len(boxes) :])
        other_boxes = spare + self._other_boxes(others, image, boxes)
        found = tuple(LocatedObject(box, _score(best), other_boxes) for box in boxes)
        notes = (*read.notes, *self._word_notes(text))
        spoken = (*dialogue, Turn("assistant", best.text))
        location = Location(text, count, spoken, found, notes)
        return self._surest(image, location) if verified > 1 else location

    def locate_with_points(
        self, image: RgbImage, expression: str, count: TargetCount = TargetCount.ONE
    ) -> Location:
        """PPG: box(es) and labelled points in one reply."""
        stage("locate")
        text = self._asked(expression)
        n_in, n_out = self.settings.positive, self.settings.negative
        question = self.speech.ask_box_and_points(text, count, n_in, n_out, image.size)
        grammar = self.speech.box_and_points_grammar(count, n_in, n_out)
        dialogue = self._opening(question)
        reply = self.mllm.generate(image, dialogue, grammar=grammar)
        read = self.speech.read_box_and_points(reply.text, n_in, n_out, image.size)
        found = tuple(LocatedObject(r.box, _score(reply), (), r.points) for r in read)
        found = found[:1] if count is TargetCount.ONE else found
        notes = self._word_notes(text)
        return Location(text, count, (*dialogue, Turn("assistant", reply.text)), found, notes)

    def stated(self, image: RgbImage, expression: str, box: Box) -> Location:
        """A location as if the MLLM had answered with this box: where round 2 can go on from."""
        text = self._asked(expression)
        question = self.speech.ask_boxes(text, TargetCount.ONE, image.size)
        reply = self.speech.write_boxes([box], image.size)
        dialogue = (*self._opening(question), Turn("assistant", reply))
        return Location(text, TargetCount.ONE, dialogue, (LocatedObject(box),))

    def candidate_points(self, box: Box, image: RgbImage) -> list[Point]:
        """The points to ask about: spread over the part of the box inside the image."""
        inside = clip_box(box, image.width, image.height)
        count, rng = self.settings.points, random.Random(0)
        match self.settings.candidates:
            case "grid":
                return grid_points(inside, count)
            case "poisson":
                return poisson_disk_points(inside, count, rng)
            case "jittered":
                return jittered_points(inside, count, rng)

    def check_points(
        self,
        image: RgbImage,
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
        stage("points")
        asked = self.candidate_points(box, image) if points is None else list(points)
        check_image_points(asked, image)
        limits = thresholds or self.settings.thresholds
        different = list(dict.fromkeys(asked))
        asking = self.settings.point_asking or self.speech.point_asking
        ask = self._ask_by_marks if asking == "marks" else self._ask_by_coordinates
        answers: dict[Point, PromptPoint] = {}
        for point, answer in zip(different, ask(image, location, box, different), strict=True):
            label = label_point(answer, limits)
            answers[point] = PromptPoint(*point, label, answer.p_yes, answer.p_no)
        return tuple(answers[point] for point in asked)

    def _ask_by_coordinates(
        self, image: RgbImage, location: Location, box: Box, points: Sequence[Point]
    ) -> list[YesNo]:
        """Round 2 as the paper has it: the dialogue of round 1 goes on."""
        answers: list[YesNo] = []
        for some in batched(points, self._points_per_question):
            question = self.speech.ask_points(location.expression, box, some, image.size)
            dialogue = (*location.dialogue, Turn("user", question))
            answers += self._yes_no(image, dialogue, len(some))
        return answers

    def _ask_by_marks(
        self, image: RgbImage, location: Location, box: Box, points: Sequence[Point]
    ) -> list[YesNo]:
        """Round 2 on a copy of the picture with numbered marks, which is a dialogue of its own."""
        marked = draw_marks(image, points, box)
        answers: list[YesNo] = []
        for some in batched(range(1, len(points) + 1), self._points_per_question):
            question = self.speech.ask_marks(location.expression, some)
            answers += self._yes_no(marked, self._opening(question), len(some))
        return answers

    @property
    def _points_per_question(self) -> int:
        """As many as the format lists, and no more than the checkpoint was taught."""
        most = self.speech.points_per_question
        return min(most, self.mllm.taught.points_per_question or most)

    def _asked(self, expression: str) -> str:
        """The expression as it is asked: checked, on one line, in lower case where only that was
        taught.

        Raises:
            ExpressionError: empty or overlong.
        """
        text = check_expression(expression)
        return text.lower() if self.mllm.taught.lower_case else text

    def _yes_no(self, image: RgbImage, dialogue: Dialogue, count: int) -> list[YesNo]:
        words = self.speech.yes_no
        answers = self.mllm.answer_yes_no(image, dialogue, words=words, count=count)
        if len(answers) != count:
            raise DialogueError(
                f"{len(answers)} answers came back for {count} points",
                raw_reply="".join("Yes" if a.p_yes >= a.p_no else "No" for a in answers),
                hint="Ask about fewer points at a time.",
            )
        return answers

    def verify(self, image: RgbImage, expression: str, boxes: Sequence[Box]) -> list[YesNo]:
        """For each box, whether its region shows what the expression describes."""
        stage("verify")
        text = self._asked(expression)
        questions = [self.speech.ask_verification(text, b, image.size) for b in boxes]
        return [self._yes_no(image, self._opening(q), 1)[0] for q in questions]

    def _surest(self, image: RgbImage, location: Location) -> Location:
        """The location with the candidate box that verification is surest of."""
        if len(location.objects) != 1 or not location.objects[0].alternates:
            return location
        first = location.objects[0]
        candidates = [ScoredBox(first.box, first.score), *first.alternates]
        answers = self.verify(image, location.expression, [c.box for c in candidates])
        ranked = sorted(
            zip(candidates, answers, strict=True), key=lambda pair: pair[1].p_yes, reverse=True
        )
        (best, _), *others = ranked
        reply = self.speech.write_boxes([best.box], image.size)
        return replace(
            location,
            dialogue=(*location.dialogue[:-1], Turn("assistant", reply)),
            objects=(LocatedObject(best.box, best.score, tuple(other for other, _ in others)),),
        )

    def draw(self, image: RgbImage, prompts: Sequence[SegmentPrompt]) -> list[MaskCandidate]:
        """Box and confident points → the chosen one of SAM's three masks, for each prompt."""
        stage("mask")
        clipped = [replace(p, box=_clip(p.box, image)) for p in prompts]
        candidates = self.segmenter.predict(image, clipped)
        return [
            choose_mask(some, prompt.points, self.settings.choose_by)
            for some, prompt in zip(candidates, clipped, strict=True)
        ]

    def _adapt(self, image: RgbImage, location: Location, found: LocatedObject) -> SegmentedObject:
        """Ask next where SAM is least sure, until answers and mask agree or the budget is spent."""
        box = clip_box(found.box, image.width, image.height)
        spacing = math.sqrt(max(box.area, 1.0)) / 8
        points: tuple[PromptPoint, ...] = ()
        drawn, doubt = self._draw_with_doubt(image, SegmentPrompt(box))
        while len(points) < self.settings.budget:
            wanted = min(self.settings.per_question, self.settings.budget - len(points))
            for point in points:
                _blot(doubt, point, spacing)
            places = uncertain_points(doubt, box, wanted, spacing)
            if not places:
                break
            new = self.check_points(image, location, found.box, places)
            points += new
            settled = agreement(drawn.mask, new) == 1.0
            drawn, doubt = self._draw_with_doubt(image, SegmentPrompt(box, points))
            if settled:
                break
        return SegmentedObject(found, points, drawn)

    def _draw_with_doubt(
        self, image: RgbImage, prompt: SegmentPrompt
    ) -> tuple[MaskCandidate, np.ndarray]:
        """The chosen mask, and at each pixel how much the three masks and the logits leave open."""
        stage("mask")
        candidates = self.segmenter.predict(image, [prompt])[0]
        drawn = choose_mask(candidates, prompt.points, self.settings.choose_by)
        votes = np.mean([c.mask.pixels for c in candidates], axis=0, dtype=np.float32)
        logits = self.segmenter.logits_at_image_size(image, drawn.logits)
        disagreement = 4 * votes * (1 - votes)  # 1 where the masks are split evenly
        return drawn, (disagreement + np.exp(-np.abs(logits))).astype(np.float32)

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
                    others.setdefault(box, ScoredBox(box, _score(reply)))
        return tuple(others.values())

    def _word_notes(self, expression: str) -> tuple[str, ...]:
        known = self.mllm.taught.words
        if known is None:
            return ()
        words = "".join(c if c.isalpha() else " " for c in expression.lower()).split()
        strange = [word for word in dict.fromkeys(words) if word not in known]
        if not strange:
            return ()
        listed = ", ".join(strange[:8])
        return (f"the model was not taught these words and may guess: {listed}",)


load = Sam4MLLM.from_pretrained


def replay(
    trace: Trace, image: RgbImage, segmenter: Segmenter, format: DialogueFormat | None = None
) -> Segmentation:
    """Run a recorded query again with its recorded replies: no MLLM, the same masks.

    Give ``format`` if the run was made with one that its name alone does not describe.
    """
    recorded = dict(trace.settings)
    format_name = recorded.pop("format")
    taught = Taught.from_notes(recorded.pop("taught"))
    recorded["thresholds"] = Thresholds(**recorded["thresholds"])
    recorded["strategy"] = Strategy(recorded["strategy"])
    model = Sam4MLLM(
        ReplayMllm(trace, format_name, taught), segmenter, Settings(**recorded), format
    )
    return model.segment(image, trace.expression, count=TargetCount(trace.count))


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


def _score(reply: Reply) -> float | None:
    if reply.log_probability is None or not reply.tokens:
        return None
    return math.exp(reply.log_probability / reply.tokens)


def _clip(box: Box | None, image: RgbImage) -> Box | None:
    return None if box is None else clip_box(box, image.width, image.height)


def _blot(doubt: np.ndarray, point: PromptPoint, radius: float) -> None:
    """Set the doubt around a point that was asked about to zero, in place."""
    rows, columns = np.ogrid[: doubt.shape[0], : doubt.shape[1]]
    doubt[(rows + 0.5 - point.y) ** 2 + (columns + 0.5 - point.x) ** 2 < radius**2] = 0


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most ``size`` items (``itertools.batched`` needs Python 3.12)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _trace(
    model: Sam4MLLM,
    recorder: Recorder,
    image: RgbImage,
    source: str,
    location: Location,
    objects: Sequence[SegmentedObject],
) -> Trace:
    return Trace(
        expression=location.expression,
        count=location.count.value,
        strategy=model.settings.strategy.value,
        status=location.status.value,
        image={
            "width": image.width,
            "height": image.height,
            "digest": image.digest,
            "source": source,
        },
        models={"mllm": model.mllm.name, "segmenter": model.segmenter.name},
        settings={
            **asdict(model.settings),
            "format": model.speech.name,
            "taught": model.mllm.taught.to_notes(),
        },
        exchanges=recorder.exchanges,
        mask_calls=recorder.mask_calls,
        objects=[_object_data(o, f"obj_{n}") for n, o in enumerate(objects, 1)],
        timings=recorder.timings,
        notes=list(location.notes),
    )


def _object_data(found: SegmentedObject, object_id: str) -> dict[str, Any]:
    return {
        "object_id": object_id,
        "box": list(found.located.box),
        "score": found.located.score,
        "points": [{**asdict(point), "label": point.label.value} for point in found.points],
        "mask": found.mask.to_rle(),
        "predicted_iou": found.drawn.predicted_iou,
        "area": found.mask.area,
    }
