"""Honest stand-ins for the two models, for tests of code built on this package.

They answer in the real dialogue and draw real masks, from a truth you state. They are shipped so
that users can test their own agents without weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.errors import PromptError
from sam4mllm_tool.formats.sam4mllm import Sam4MllmFormat
from sam4mllm_tool.geometry import box_iou, from_grid
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.protocols import (
    NO_NOTES,
    CheckpointNotes,
    Dialogue,
    MaskCandidate,
    Reply,
    SegmentPrompt,
    YesNoWords,
)
from sam4mllm_tool.types import Box, Mask, PointLabel, RgbImage, YesNo

_POINT = re.compile(r"\((\d+),(\d+)\)")
_QUOTED = re.compile(r'\n"(.*)"\.$')


@dataclass
class TruthfulMllm:
    """Answers the ``sam4mllm`` dialogue from stated masks, with a given certainty.

    Attributes:
        truth: expression → masks of its targets; an unknown expression has none.
        certainty: probability given to the true answer.
        said: every question asked, for assertions.
    """

    truth: Mapping[str, Sequence[Mask]]
    certainty: float = 0.97
    name: str = "truthful"
    format_name: str = "sam4mllm"
    notes: CheckpointNotes = NO_NOTES
    said: list[str] = field(default_factory=list)

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """The true boxes, in the format's words."""
        self.said.append(dialogue[-1].text)
        boxes = [mask.box for mask in self._targets(dialogue) if mask.box]
        return Reply(Sam4MllmFormat().write_boxes(boxes, image.size), -0.1, 4, 1)

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The true boxes first, then the boxes of other expressions."""
        form = Sam4MllmFormat()
        others = [mask.box for masks in self.truth.values() for mask in masks if mask.box]
        replies = [self.generate(image, dialogue)]
        replies += [Reply(form.write_boxes([box], image.size), -3.0, 4, 1) for box in others]
        different: dict[str, Reply] = {}
        for reply in replies:
            different.setdefault(reply.text, reply)
        return list(different.values())[:count]

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The true boxes with the given certainty, else that there is nothing."""
        true = self.generate(image, dialogue)
        nothing = Reply(Sam4MllmFormat().write_boxes([], image.size), -3.0, 1, 1)
        sure = round(self.certainty * count)
        return [true] * sure + [nothing] * (count - sure)

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """The true answer for each point, or for a box that is to be verified."""
        text = dialogue[-1].text
        self.said.append(text)
        masks = self._targets(dialogue)
        if text.startswith("Does the region"):
            (box,) = Sam4MllmFormat().read_boxes(text, image.size).boxes
            return [self._answer(any(m.box and box_iou(m.box, box) >= 0.5 for m in masks))]
        listed = text.rpartition("\n")[2]
        answers = []
        for x, y in _POINT.findall(listed):
            point = from_grid(int(x), image.width), from_grid(int(y), image.height)
            answers.append(self._answer(any(mask.contains(*point) for mask in masks)))
        return answers[:count]

    def _answer(self, yes: bool) -> YesNo:
        rest = 1 - self.certainty
        return YesNo(self.certainty, rest) if yes else YesNo(rest, self.certainty)

    def _targets(self, dialogue: Dialogue) -> Sequence[Mask]:
        for turn in dialogue:
            quoted = _QUOTED.search(turn.text)
            if turn.role == "user" and quoted:
                return self.truth.get(quoted[1], ())
        return ()


@dataclass
class ScriptedMllm:
    """Gives the stated replies in order, whatever is asked: for replies that do not parse."""

    replies: list[str]
    answers: list[list[YesNo]] = field(default_factory=list)
    name: str = "scripted"
    format_name: str = "sam4mllm"
    notes: CheckpointNotes = NO_NOTES

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """The next reply."""
        return Reply(self.replies.pop(0))

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The next replies."""
        return [Reply(self.replies.pop(0)) for _ in range(min(count, len(self.replies)))]

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """The next list of answers."""
        return self.answers.pop(0)


@dataclass
class ColourSegmenter:
    """Draws the pixels of the box whose colour is near that of a foreground point.

    Without a point, the colour at the box's centre is used. Pixels near the colour of a background
    point are left out. The three candidates differ in how near the colour must be. Logits are at
    the size of the image and go from -16 to 16.

    A former mask decides where the colours leave room: its logits, cut to -4 … 4, are added. A
    pixel of a foreground point's own colour has 6 in the best candidate, so a point overrules the
    former mask, and shades between it and the background go by the former mask. With neither box
    nor points, the former mask is drawn as it is.

    Attributes:
        embedded: digests of the images shown, for assertions.
        prompts: every prompt drawn from, for assertions.
    """

    name: str = "colour"
    embedded: list[str] = field(default_factory=list)
    prompts: list[SegmentPrompt] = field(default_factory=list)

    def embed(self, image: RgbImage) -> None:
        """Note that the image was shown."""
        self.embedded.append(image.digest)

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """Three masks per prompt, the middle one with the best predicted IoU.

        Raises:
            PromptError: a prompt holds neither box nor labelled point nor mask.
        """
        self.prompts.extend(prompts)
        return [
            tuple(
                self._candidate(image, prompt, reach, quality)
                for reach, quality in ((8.0, 0.7), (48.0, 0.9), (128.0, 0.6))
            )
            for prompt in prompts
        ]

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The logits: they are at the size of the image already."""
        return logits

    def _candidate(
        self, image: RgbImage, prompt: SegmentPrompt, reach: float, quality: float
    ) -> MaskCandidate:
        former = prompt.mask_logits
        logits = self._by_colour(image, prompt, reach)
        if former is not None:
            logits = former if logits is None else logits + np.clip(former, -4, 4)
        if logits is None:
            raise PromptError("the prompt is empty", hint="Give a box or a point.")
        return MaskCandidate(Mask(logits > 0), logits, quality)

    def _by_colour(
        self, image: RgbImage, prompt: SegmentPrompt, reach: float
    ) -> NDArray[np.float32] | None:
        """How near each pixel of the box is to the prompt's colours, -16 outside the box."""
        box = prompt.box or Box(0, 0, image.width, image.height)
        seeds = [(p.x, p.y) for p in prompt.points if p.label is PointLabel.FOREGROUND]
        away = [(p.x, p.y) for p in prompt.points if p.label is PointLabel.BACKGROUND]
        if not seeds and prompt.box is None:
            return None
        window = _pixels_of(box, image.size)
        inside = (reach - _distance(image, seeds or [box.centre], window)) / 8
        if away:
            inside = np.minimum(inside, (_distance(image, away, window) - reach) / 8 + 1)
        logits = np.full((image.height, image.width), -16, np.float32)
        logits[window] = inside.clip(-16, 16)
        return logits


def _pixels_of(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns whose pixels' centres lie in the box."""
    spans = ((box.y_min, box.y_max, size[1]), (box.x_min, box.x_max, size[0]))
    rows, columns = (
        slice(max(0, math.ceil(low - 0.5)), min(end, max(0, math.ceil(high - 0.5))))
        for low, high, end in spans
    )
    return rows, columns


def _distance(
    image: RgbImage, places: Sequence[tuple[float, float]], window: tuple[slice, slice]
) -> NDArray[np.float32]:
    """Colour distance of the window's pixels to the nearest of the places' colours."""
    pixels = image.array[window].astype(np.float32)
    seeds = [
        image.array[min(int(y), image.height - 1), min(int(x), image.width - 1)].astype(np.float32)
        for x, y in places
    ]
    nearest = np.full(pixels.shape[:2], np.inf, np.float32)
    for seed in np.unique(seeds, axis=0):
        np.minimum(nearest, np.linalg.norm(pixels - seed, axis=2), out=nearest)
    return nearest
