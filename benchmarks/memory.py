"""Models that remember what they were asked, so that settings which ask the same share the work.

Several settings of one expression ask the same round 1 and show SAM the same prompts. The second
time, the answer comes from memory, and :attr:`Memory.saved` counts the seconds that computing it
had taken, so that the cost of each setting stays known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.protocols import (
    Dialogue,
    MaskCandidate,
    Mllm,
    Question,
    Reply,
    Segmenter,
    SegmentPrompt,
    YesNoWords,
    answer_each,
)
from sam4mllm_tool.segmenter.base import shown_points
from sam4mllm_tool.types import RgbImage, YesNo

T = TypeVar("T")


@dataclass
class Memory:
    """Answers by question, with the seconds that each took.

    Attributes:
        saved: seconds that the answers given from memory had taken when they were computed.
    """

    saved: float = 0.0
    _known: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    def each(
        self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[T]]
    ) -> list[T]:
        """The answer to each key; ``compute`` gets the positions of those that are not known."""
        missing = [number for number, key in enumerate(keys) if key not in self._known]
        self.saved += sum(self._known[key][1] for key in keys if key in self._known)
        if missing:
            start = perf_counter()
            answers = compute(missing)
            share = (perf_counter() - start) / len(missing)
            for number, answer in zip(missing, answers, strict=True):
                self._known[keys[number]] = (answer, share)
        return [cast(T, self._known[key][0]) for key in keys]

    def one(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The answer to one key."""
        (answer,) = self.each([key], lambda _: [compute()])
        return answer

    def forget(self) -> None:
        """Begin anew, as for the next picture."""
        self.saved = 0.0
        self._known.clear()


class RememberingMllm:
    """An MLLM that is asked each question once."""

    def __init__(self, mllm: Mllm, memory: Memory) -> None:
        self._mllm, self._memory = mllm, memory
        self.name, self.format_name, self.notes = mllm.name, mllm.format_name, mllm.notes

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """As the wrapped MLLM."""
        return self._memory.one(
            ("generate", image.digest, dialogue, grammar, max_new_tokens),
            lambda: self._mllm.generate(
                image, dialogue, grammar=grammar, max_new_tokens=max_new_tokens
            ),
        )

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """As the wrapped MLLM."""
        return self._memory.one(
            ("alternates", image.digest, dialogue, grammar, count),
            lambda: self._mllm.alternates(image, dialogue, grammar=grammar, count=count),
        )

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """As the wrapped MLLM."""
        (answers,) = self.answer_each([Question(image, dialogue, count)], words=words)
        return answers

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """As the wrapped MLLM, the questions that were not asked before together."""
        return self._memory.each(
            [("yes or no", one.image.digest, one.dialogue, one.count, words) for one in questions],
            lambda missing: answer_each(
                self._mllm, [questions[number] for number in missing], words=words
            ),
        )


class RememberingSegmenter:
    """A segmenter that draws each prompt once; undecided points are no part of a prompt."""

    def __init__(self, segmenter: Segmenter, memory: Memory) -> None:
        self._segmenter, self._memory = segmenter, memory
        self.name = segmenter.name

    def embed(self, image: RgbImage) -> None:
        """As the wrapped segmenter."""
        self._memory.one(("embed", image.digest), lambda: self._segmenter.embed(image))

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """As the wrapped segmenter, the prompts that were not drawn before together."""
        return self._memory.each(
            [("draw", image.digest, *_shown(prompt)) for prompt in prompts],
            lambda missing: self._segmenter.predict(image, [prompts[number] for number in missing]),
        )

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """As the wrapped segmenter, computed each time."""
        return self._segmenter.logits_at_image_size(image, logits)


def _shown(prompt: SegmentPrompt) -> tuple[Hashable, ...]:
    """What a segmenter sees of a prompt."""
    former = None if prompt.mask_logits is None else prompt.mask_logits.tobytes()
    points = tuple((point.x, point.y, point.label) for point in shown_points(prompt))
    return prompt.box, points, former
