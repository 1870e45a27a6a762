"""What a backend must do: an MLLM that talks about an image, a segmenter that draws masks.

Images are passed as values. A backend may keep what it computed for an image (a prefilled
key-value cache, an image embedding) in a bounded cache keyed by ``image.digest``; that must never
change a result, only the time it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.types import Box, Mask, PromptPoint, RgbImage, YesNo

__all__ = [
    "ANYTHING",
    "Dialogue",
    "MaskCandidate",
    "Mllm",
    "Reply",
    "SegmentPrompt",
    "Segmenter",
    "Taught",
    "Turn",
    "YesNoWords",
]


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue, plain text."""

    role: Literal["system", "user", "assistant"]
    text: str


Dialogue = tuple[Turn, ...]
"""Messages in order, the last one from the user. The image belongs to the first user turn and
stands before its text, so that everything up to the image is a prefix that dialogues share."""


@dataclass(frozen=True)
class YesNoWords:
    """How a family says yes and no, and the text that stands before its first answer."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    prefix: str = ""


@dataclass(frozen=True)
class Reply:
    """What the MLLM said.

    Attributes:
        text: the reply without the end-of-turn token.
        log_probability: sum over the reply's free tokens (those a grammar did not force) of the
            natural-log probability, renormalised over the tokens the grammar allows; ``None``
            where a backend cannot tell.
        tokens: number of free tokens.
        forward_passes: model calls spent, image prefill included when it was not cached.
    """

    text: str
    log_probability: float | None = None
    tokens: int = 0
    forward_passes: int = 0


@dataclass(frozen=True)
class Taught:
    """The bounds of what a small checkpoint was taught; none for a model with a general vocabulary.

    Read from ``sam4mllm.json`` beside the checkpoint and its adapter, the keys in brackets.

    Attributes:
        words: lower-case words, ``None`` for any (``vocabulary``).
        lower_case: its expressions had no capitals, so that others mean nothing to it
            (``lower_case``).
        points_per_question: most points of a round-2 question, ``None`` for as many as the format
            lists (``points_per_question``).
    """

    words: frozenset[str] | None = None
    lower_case: bool = False
    points_per_question: int | None = None

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> Taught:
        """What a checkpoint's notes say.

        Raises:
            CheckpointError: a limit that is no number above 0.
        """
        words, limit = notes.get("vocabulary"), notes.get("points_per_question")
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise CheckpointError(
                f"points_per_question is {limit!r} in the checkpoint's notes",
                hint="sam4mllm.json needs a whole number above 0 there, or null.",
            )
        return cls(
            None if words is None else frozenset(str(word).lower() for word in words),
            bool(notes.get("lower_case", False)),
            limit,
        )

    def to_notes(self) -> dict[str, Any]:
        """The inverse of :meth:`from_notes`, JSON-ready."""
        return {
            "vocabulary": None if self.words is None else sorted(self.words),
            "lower_case": self.lower_case,
            "points_per_question": self.points_per_question,
        }


ANYTHING = Taught()
"""Of a model without bounds."""


@runtime_checkable
class Mllm(Protocol):
    """A multimodal LLM that holds dialogues about one image."""

    @property
    def name(self) -> str:
        """Checkpoint (and adapter) behind it, for traces."""

    @property
    def format_name(self) -> str:
        """Default dialogue format of this checkpoint (a key of ``formats.FORMATS``)."""

    @property
    def taught(self) -> Taught:
        """The bounds of what it was taught."""

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """Greedy reply to the last user turn, restricted to ``grammar`` if one is given."""

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """Up to ``count`` different likely replies over the same prefix, best first, scored.

        The first one is the greedy reply of :meth:`generate`.
        """

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to the last user turn's ``count`` questions, given in one reply.

        Each slot is conditioned on the answers before it, each the likelier of yes and no
        (constrained greedy decoding). Probabilities are full-vocabulary softmax values, summed
        over the spellings in ``words``.
        """


@dataclass(frozen=True)
class SegmentPrompt:
    """What SAM is told about one object: a box and/or labelled points, and a former mask.

    Attributes:
        box: pixels of the image, or ``None``.
        points: foreground and background points in pixels (undecided ones are not shown to SAM).
        mask_logits: low-resolution logits of a former :class:`MaskCandidate`, or ``None``.
    """

    box: Box | None = None
    points: tuple[PromptPoint, ...] = ()
    mask_logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class MaskCandidate:
    """One of the masks SAM proposes for a prompt.

    Attributes:
        mask: at the size of the image.
        logits: low-resolution ``float32`` logits (a quarter of the model's input side), 0 = edge,
            in the model's padded frame; fit to go back as ``SegmentPrompt.mask_logits``.
        predicted_iou: the segmenter's own estimate of the mask's IoU with the truth.
    """

    mask: Mask
    logits: NDArray[np.float32]
    predicted_iou: float


@runtime_checkable
class Segmenter(Protocol):
    """A promptable segmenter of the SAM kind."""

    @property
    def name(self) -> str:
        """Checkpoint behind it, for traces."""

    def embed(self, image: RgbImage) -> None:
        """Compute and keep the image embedding, so that the next ``predict`` need not."""

    def predict(
        self, image: RgbImage, prompts: Sequence[SegmentPrompt]
    ) -> list[tuple[MaskCandidate, ...]]:
        """Three candidate masks a prompt (in the model's order), for all prompts of one image.

        Raises:
            PromptError: a prompt holds neither box nor labelled point nor mask.
        """

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Low-resolution logits brought to the image: ``float32`` of shape (height, width)."""
