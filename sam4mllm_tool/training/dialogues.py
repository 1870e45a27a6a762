"""Any referring data set as conversations in the published strings: the LoRA's training data.

PQPP conversations hold both rounds; PPG conversations hold the box and prompt points, chosen by
the masks that a segmenter draws from them. Several references to one picture are packed into one
conversation. All random choices follow from the seed and the image's id, so a conversation does
not depend on those before it, and they can be streamed, resumed and divided among workers.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, overload

import numpy as np

from sam4mllm_tool.datasets.record import ReferringExample
from sam4mllm_tool.datasets.vqa import VqaExample
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.formats.base import DialogueFormat
from sam4mllm_tool.masks.relations import mask_iou
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt, Turn
from sam4mllm_tool.training.candidates import Candidates, well_inside
from sam4mllm_tool.types import Box, Mask, Point, PointLabel, PromptPoint, RgbImage, TargetCount


@dataclass(frozen=True)
class Recipe:
    """How conversations are made; kept beside an adapter that was trained on them.

    Attributes:
        format: dialogue format (a key of ``FORMATS``).
        seed: of all random choices.
        references: most references (or VQA pairs) a conversation holds.
        ppg_share: share of references asked with PPG; the rest with PQPP.
        candidates: the box and the points of round-2 questions.
        count: that round-1 questions ask with; ``None``: what the data set promises.
        every_target: round 2 asks about each target, in random order, not about one of them.
        order: of the boxes in a reply: from left to right, or as the data set lists them.
        picture: (width, height) that pictures are resized to before the model sees them.
        positive, negative: points of a PPG reply on and off the object (our numbers, as are the
            next two: the paper says "few").
        inset: PPG points lie at least this share as deep in the object, or in the rest of the box,
            as its deepest pixels do: points at an outline would be ambiguous.
        tries: groups of points drawn for a PPG target.
        best: the reply is one of this many groups whose mask is closest to the truth.
        vqa_share: share of conversations that are VQA pairs without masks, where pairs are given.
        loosened: share of references asked with a less strict count than their data set's ("0+"
            for "1"), so that "0+" does not always mean "none" in the training data.
    """

    format: str = "sam4mllm"
    seed: int = 0
    references: int = 5
    ppg_share: float = 0.25
    candidates: Candidates = field(default_factory=Candidates)
    count: TargetCount | None = None
    every_target: bool = False
    order: Literal["left to right", "annotated"] = "left to right"
    picture: tuple[int, int] | None = None
    positive: int = 3
    negative: int = 1
    inset: float = 0.5
    tries: int = 8
    best: int = 2
    vqa_share: float = 0.0
    loosened: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """One picture, and turns that alternate user and assistant.

    Attributes:
        image_id: of the picture.
        image: upright picture.
        turns: without a system turn; replies begin as the format's replies do.
        topics: one per user turn: "box", "points", "ppg" or "vqa".
        points: the points a round-2 or PPG turn speaks of, by turn number, for drawings.
    """

    image_id: str
    image: RgbImage
    turns: tuple[Turn, ...]
    topics: tuple[str, ...]
    points: dict[int, tuple[PromptPoint, ...]]

    def shortened(self) -> Conversation:
        """The same without its last question and reply."""
        last = len(self.topics) - 1
        points = {number: some for number, some in self.points.items() if number < last}
        return replace(self, turns=self.turns[:-2], topics=self.topics[:-1], points=points)


@dataclass(frozen=True)
class _Exchange:
    """A question with its reply."""

    topic: str
    question: str
    reply: str
    points: tuple[PromptPoint, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """References to one picture that go into one conversation.

    Attributes:
        image_id: of the picture.
        number: of the chunk among the picture's.
        references: records, each with one of its expressions.
    """

    image_id: str
    number: int
    references: tuple[tuple[ReferringExample, str], ...]


def chunks(
    examples: Iterable[ReferringExample],
    recipe: Recipe,
    vqa: Sequence[VqaExample] = (),
    excluded: Collection[str] = (),
) -> Iterator[Chunk | VqaExample]:
    """The contents of each conversation; no picture is opened.

    Args:
        examples: records of a data set; neighbours on the same image share conversations.
        recipe: how conversations are made.
        vqa: pictures to mix in.
        excluded: image ids to leave out (those of val and test splits).
    """
    barred = frozenset(excluded)
    for image_id, group in groupby(examples, key=lambda example: example.image_id):
        if image_id in barred:
            continue
        rng = random.Random(f"{recipe.seed}/{image_id}")
        references = [(example, text) for example in group for text in example.expressions]
        rng.shuffle(references)
        for number, start in enumerate(range(0, len(references), recipe.references)):
            while vqa and rng.random() < recipe.vqa_share:
                yield rng.choice(vqa)
            part = references[start : start + recipe.references]
            yield Chunk(image_id, number, tuple(part))


def converse(
    about: Chunk | VqaExample, recipe: Recipe, segmenter: Segmenter | None = None
) -> Conversation:
    """The conversation about a chunk; ``segmenter`` judges PPG groups (none: no PPG)."""
    if isinstance(about, VqaExample):
        rng = random.Random(f"{recipe.seed}/{about.image_id}")
        return _vqa_conversation(about, recipe, rng)
    rng = random.Random(f"{recipe.seed}/{about.image_id}/{about.number}")
    image = about.references[0][0].open_image()
    maker = _Maker(image, recipe, segmenter, rng, key=f"{recipe.seed}/{about.image_id}")
    exchanges = [
        one for example, text in about.references for one in maker.exchanges(example, text)
    ]
    return _conversation(about.image_id, image, exchanges)


def conversations(
    examples: Iterable[ReferringExample],
    recipe: Recipe,
    segmenter: Segmenter | None = None,
    vqa: Sequence[VqaExample] = (),
    excluded: Collection[str] = (),
) -> Iterator[Conversation]:
    """Stream conversations; arguments as of :func:`chunks` and :func:`converse`."""
    for about in chunks(examples, recipe, vqa, excluded):
        yield converse(about, recipe, segmenter)


class Conversations(Sequence[Conversation]):
    """Conversations made when asked for, so that no more than one picture is in memory."""

    def __init__(
        self,
        about: Iterable[Chunk | VqaExample],
        recipe: Recipe,
        segmenter: Segmenter | None = None,
    ) -> None:
        self._about, self._recipe, self._segmenter = list(about), recipe, segmenter

    def __len__(self) -> int:
        return len(self._about)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Conversations: ...

    def __getitem__(self, index: int | slice) -> Conversation | Conversations:
        if isinstance(index, slice):
            return Conversations(self._about[index], self._recipe, self._segmenter)
        return converse(self._about[index], self._recipe, self._segmenter)


class _Maker:
    """Makes exchanges about one picture."""

    def __init__(
        self,
        image: RgbImage,
        recipe: Recipe,
        segmenter: Segmenter | None,
        rng: random.Random,
        key: str,
    ) -> None:
        self.image, self.recipe, self.segmenter, self.rng = image, recipe, segmenter, rng
        self.key = key
        self.form: DialogueFormat = get_format(recipe.format)

    def exchanges(self, example: ReferringExample, text: str) -> list[_Exchange]:
        """PPG for some single and absent ones, else round 1 and, if one is there, round 2."""
        masks = example.truth()
        count = self._count(example)
        few = len(masks) <= 1
        if self.segmenter and few and self.rng.random() < self.recipe.ppg_share:
            ppg = (
                self._ppg(text, count, masks[0], example.boxes[0]) if masks else self._no_ppg(text)
            )
            if ppg:
                return [ppg]
        order = list(range(len(masks)))
        if self.recipe.order == "left to right":
            order.sort(key=lambda n: example.boxes[n][:2])
        boxes = [example.boxes[n] for n in order]
        size = self.image.size
        first = _Exchange(
            "box", self.form.ask_boxes(text, count, size), self.form.write_boxes(boxes, size)
        )
        if not masks:
            return [first]
        asked = self.rng.sample(order, len(order) if self.recipe.every_target else 1)
        around = example.others() or []
        return [first] + [
            self._round_two(
                text,
                masks[one],
                example.boxes[one],
                [mask for n, mask in enumerate(masks) if n != one] + around,
            )
            for one in asked
        ]

    def _count(self, example: ReferringExample) -> TargetCount:
        """What the question promises: as much as the data set does, or less."""
        number, counts = len(example.masks), list(TargetCount)
        if self.recipe.count is not None:
            return self.recipe.count
        if number == 0 or example.count is TargetCount.ZERO_OR_MORE:
            return TargetCount.ZERO_OR_MORE
        several = number > 1 or example.count is TargetCount.ONE_OR_MORE
        true = TargetCount.ONE_OR_MORE if several else TargetCount.ONE
        loosen = self.recipe.loosened and self.rng.random() < self.recipe.loosened
        return self.rng.choice(counts[counts.index(true) + 1 :]) if loosen else true

    def _round_two(self, text: str, mask: Mask, box: Box, others: Sequence[Mask]) -> _Exchange:
        size = self.image.size
        asked, points = self.recipe.candidates.draw(box, mask, others, self.rng, self.key)
        labels = [_label(mask, point) for point in points]
        words = self.form.yes_no
        reply = "".join(
            (words.yes if label is PointLabel.FOREGROUND else words.no)[0] for label in labels
        )
        question = self.form.ask_points(text, asked, points, size)
        shown = tuple(PromptPoint(*p, label) for p, label in zip(points, labels, strict=True))
        return _Exchange("points", question, reply, shown)

    def _ppg(self, text: str, count: TargetCount, mask: Mask, box: Box) -> _Exchange | None:
        """The group of prompt points, out of ``tries``, with the segmenter's best mask."""
        assert self.segmenter is not None
        recipe, size = self.recipe, self.image.size
        places = self._ppg_places(mask, box)
        groups = [group for _ in range(recipe.tries) if (group := self._group(*places))]
        if not groups:
            return None
        prompts = [SegmentPrompt(box, group) for group in groups]
        judged = []
        for group, candidates in zip(
            groups, self.segmenter.predict(self.image, prompts), strict=True
        ):
            best = max(candidates, key=lambda candidate: candidate.predicted_iou)
            judged.append((mask_iou(best.mask, mask), group))
        judged.sort(key=lambda pair: -pair[0])
        chosen = self.rng.choice(judged[: recipe.best])[1]
        question = self.form.ask_box_and_points(text, count, recipe.positive, recipe.negative, size)
        written = self.form.ask_points(text, box, [Point(p.x, p.y) for p in chosen], size)
        reply = f"{self.form.write_boxes([box], size)} {written.partition(chr(10))[2]}"
        return _Exchange("ppg", question, reply, chosen)

    def _no_ppg(self, text: str) -> _Exchange:
        """PPG's question about something that is not there."""
        recipe, size, count = self.recipe, self.image.size, TargetCount.ZERO_OR_MORE
        question = self.form.ask_box_and_points(text, count, recipe.positive, recipe.negative, size)
        return _Exchange("ppg", question, self.form.write_boxes([], size))

    def _ppg_places(self, mask: Mask, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of pixels well on the mask, and well off it inside the box."""
        pixels = mask.pixels
        x0, y0, x1, y1 = (int(edge) for edge in box)
        window = np.zeros_like(pixels)
        window[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
        inset = self.recipe.inset
        on = np.argwhere(well_inside(pixels, inset))
        return on, np.argwhere(well_inside(~pixels, inset, among=window & ~pixels))

    def _group(self, on: np.ndarray, off: np.ndarray) -> tuple[PromptPoint, ...] | None:
        """Points on the object and off it; ``None`` where either has too few pixels."""
        chosen: list[PromptPoint] = []
        for label, places, number in (
            (PointLabel.FOREGROUND, on, self.recipe.positive),
            (PointLabel.BACKGROUND, off, self.recipe.negative),
        ):
            if len(places) < number:
                return None
            for row, column in places[self.rng.sample(range(len(places)), number)]:
                chosen.append(PromptPoint(float(column) + 0.5, float(row) + 0.5, label))
        return tuple(chosen)


def _label(mask: Mask, point: Point) -> PointLabel:
    return PointLabel.FOREGROUND if mask.contains(*point) else PointLabel.BACKGROUND


def _conversation(image_id: str, image: RgbImage, exchanges: Sequence[_Exchange]) -> Conversation:
    turns, points = [], {}
    for number, exchange in enumerate(exchanges):
        turns += [Turn("user", exchange.question), Turn("assistant", exchange.reply)]
        if exchange.points:
            points[number] = exchange.points
    topics = tuple(exchange.topic for exchange in exchanges)
    return Conversation(image_id, image, tuple(turns), topics, points)


def _vqa_conversation(example: VqaExample, recipe: Recipe, rng: random.Random) -> Conversation:
    pairs = rng.sample(example.pairs, min(recipe.references, len(example.pairs)))
    exchanges = [_Exchange("vqa", question, answer) for question, answer in pairs]
    return _conversation(example.image_id, example.open_image(), exchanges)
