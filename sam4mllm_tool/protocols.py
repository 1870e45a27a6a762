"""What a backend must do: an MLLM that talks about an image, a segmenter that draws masks.

Images are passed as values. A backend may keep what it computed for an image (a prefilled
key-value cache, an image embedding) in a bounded cache keyed by ``image.digest``; that must never
change a result, only the time it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, field_serializer, field_validator

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.types import Box, Mask, PromptPoint, RgbImage, YesNo

__all__ = [
    "NO_NOTES",
    "AnswersEach",
    "CheckpointNotes",
    "Dialogue",
    "MaskCandidate",
    "Mllm",
    "Proposal",
    "Proposer",
    "Question",
    "Reply",
    "SamplesReplies",
    "SegmentPrompt",
    "Segmenter",
    "Turn",
    "Verification",
    "YesNoWords",
    "answer_each",
    "sample_replies",
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
    """How a family writes yes and no; the first spelling of each is the one taught."""

    yes: tuple[str, ...]
    no: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What the MLLM replied.

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


Verification = Literal["question", "posterior"]
"""How an MLLM tells whether a box shows what an expression describes: it is asked that as a yes/no
question, or its own answers to "where is it?" are compared with the box."""


class CheckpointNotes(BaseModel):
    """What a checkpoint states about itself in ``sam4mllm.json`` beside its weights.

    Attributes:
        vocabulary: lower-case words a small model was taught, ``None`` for a general vocabulary.
        correct_spelling: whether misspelt words of that vocabulary are corrected before asking.
        lower_case: whether it was taught lower-case expressions only.
        points_per_question: the longest list of points it was taught to answer.
        box_calibration: slope and intercept of a logistic function from the logarithm of a box's
            likelihood to the probability that the box is right (Platt scaling, 1999).
        verification: how boxes are to be verified; "posterior" where the question was not taught.
        caution: a sentence that every result should carry.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocabulary: frozenset[str] | None = None
    correct_spelling: bool = True
    lower_case: bool = False
    points_per_question: PositiveInt | None = None
    box_calibration: tuple[float, float] | None = None
    verification: Verification = "question"
    caution: str = ""

    def box_probability(self, likelihood: float) -> float | None:
        """The probability that a box of that likelihood is right, ``None`` if not calibrated."""
        if self.box_calibration is None:
            return None
        slope, intercept = self.box_calibration
        return 1 / (1 + math.exp(-(slope * math.log(max(likelihood, 1e-12)) + intercept)))

    @field_validator("vocabulary")
    @classmethod
    def _lower_case(cls, words: frozenset[str] | None) -> frozenset[str] | None:
        return None if words is None else frozenset(word.lower() for word in words)

    @field_serializer("vocabulary")
    def _sorted(self, words: frozenset[str] | None) -> list[str] | None:
        return None if words is None else sorted(words)


NO_NOTES = CheckpointNotes()


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
    def notes(self) -> CheckpointNotes:
        """What the checkpoint states about itself."""

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
class Question:
    """A question for :meth:`Mllm.answer_yes_no`: an image, a dialogue, and a number of answers."""

    image: RgbImage
    dialogue: Dialogue
    count: int = 1


@runtime_checkable
class AnswersEach(Protocol):
    """What an :class:`Mllm` may do besides: answer several questions in less time than one by one.

    Optional; :func:`answer_each` asks one after the other where it is missing.
    """

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """:meth:`Mllm.answer_yes_no` of each; the answers do not hang on each other."""


def answer_each(
    mllm: Mllm, questions: Sequence[Question], *, words: YesNoWords
) -> list[list[YesNo]]:
    """The answers to each question: at once, if the MLLM can do that, else one after the other."""
    if isinstance(mllm, AnswersEach):
        return mllm.answer_each(questions, words=words)
    return [
        mllm.answer_yes_no(one.image, one.dialogue, words=words, count=one.count)
        for one in questions
    ]


@runtime_checkable
class SamplesReplies(Protocol):
    """What an :class:`Mllm` may do besides: reply as often as there are replies to weigh."""

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """``count`` replies to the last user turn, drawn from the model's distribution.

        Temperature 1 within ``grammar``: a reply of probability p comes about p·``count`` times.
        The same call gets the same replies.
        """


def sample_replies(
    mllm: Mllm, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar | None, count: int
) -> list[Reply]:
    """The MLLM's :meth:`SamplesReplies.sample`.

    Raises:
        InputError: the MLLM cannot sample, or its replies have no grammar.
    """
    if grammar is None or not isinstance(mllm, SamplesReplies):
        raise InputError(
            f"{mllm.name} cannot sample its replies",
            hint="Verify by the question instead: Settings(verification='question').",
        )
    return mllm.sample(image, dialogue, grammar=grammar, count=count)


@dataclass(frozen=True)
class SegmentPrompt:
    """The prompt for one object: a box and/or labelled points, and a former mask.

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
            in the model's padded frame; fit to go back as ``SegmentPrompt.mask_logits``. ``None``
            for a mask that a proposer drew.
        predicted_iou: the segmenter's own estimate of the mask's IoU with the truth; of a
            proposer's mask, its confidence.
    """

    mask: Mask
    logits: NDArray[np.float32] | None
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
        """Three candidate masks per prompt (in the model's order), for all prompts of one image.

        Raises:
            PromptError: a prompt holds neither box nor labelled point nor mask.
        """

    def logits_at_image_size(
        self, image: RgbImage, logits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Low-resolution logits brought to the image: ``float32`` of shape (height, width)."""


@dataclass(frozen=True)
class Proposal:
    """One candidate for a phrase.

    Attributes:
        box: pixels of the image, inside it.
        confidence: how much the proposer believes in it, 0 to 1: orders the candidates of one
            phrase, and is not calibrated. ``None`` where a backend does not say.
        mask: at the size of the image; ``None`` from proposers that find boxes only.
    """

    box: Box
    confidence: float | None = None
    mask: Mask | None = None


@runtime_checkable
class Proposer(Protocol):
    """Finds what a short phrase may mean, every instance of it."""

    @property
    def name(self) -> str:
        """Checkpoint behind it, for traces."""

    def propose(self, image: RgbImage, phrase: str, limit: int) -> list[Proposal]:
        """Up to ``limit`` different candidates, the most confident first; none is a result.

        Raises:
            ExpressionError: the phrase is longer than the model reads.
            BackendError: the model's output is not finite, as with damaged weights.
            DeviceOutOfMemory: the device is too small.
        """
