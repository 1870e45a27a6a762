"""What a dialogue format must do: put questions to one model family, and read its replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.protocols import YesNoWords
from sam4mllm_tool.types import Box, Point, PromptPoint, TargetCount

PointAsking = Literal["coordinates", "marks"]
"""Points named by their coordinates, or by numbered marks drawn on the picture."""

Size = tuple[int, int]
"""(width, height) of the upright image in pixels."""


@dataclass(frozen=True)
class BoxesRead:
    """Boxes found in a reply, in pixels; empty means the model found nothing."""

    boxes: tuple[Box, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptsRead:
    """One box with labelled points, read from a PPG reply, in pixels."""

    box: Box
    points: tuple[PromptPoint, ...]


@runtime_checkable
class DialogueFormat(Protocol):
    """How a model family is asked and how it answers. Stateless.

    Coordinates are pixels of the upright image on our side; each format converts to its own.
    Every ``read_*`` raises :class:`~sam4mllm_tool.errors.DialogueError` for a reply it cannot read.
    """

    @property
    def name(self) -> str:
        """Key in ``FORMATS``."""

    @property
    def system_prompt(self) -> str | None:
        """System turn, or ``None`` for the checkpoint's own default."""

    @property
    def yes_no(self) -> YesNoWords:
        """How round 2 answers."""

    @property
    def points_per_question(self) -> int:
        """How many points one round-2 question may list."""

    @property
    def point_asking(self) -> PointAsking:
        """How points are named for this family by default: by coordinates or by marks."""

    def ask_boxes(self, expression: str, count: TargetCount, size: Size) -> str:
        """Round 1: where is it?"""

    def box_grammar(self, count: TargetCount) -> Grammar | None:
        """Grammar of round 1's reply, ``None`` if the model should write freely."""

    def write_boxes(self, boxes: Sequence[Box], size: Size) -> str:
        """The reply that states these boxes; also how a corrected box is put into the dialogue."""

    def read_boxes(self, reply: str, size: Size) -> BoxesRead:
        """Boxes of a round-1 reply."""

    def ask_points(self, expression: str, box: Box, points: Sequence[Point], size: Size) -> str:
        """Round 2: is each of these points on the object?"""

    def ask_marks(self, expression: str, marks: Sequence[int]) -> str:
        """Round 2 on a picture with numbered marks: is each of these marks on the object?"""

    def ask_box_and_points(
        self, expression: str, count: TargetCount, positive: int, negative: int, size: Size
    ) -> str:
        """PPG: box and labelled points in one reply."""

    def box_and_points_grammar(
        self, count: TargetCount, positive: int, negative: int
    ) -> Grammar | None:
        """Grammar of the PPG reply."""

    def read_box_and_points(
        self, reply: str, positive: int, negative: int, size: Size
    ) -> tuple[PromptsRead, ...]:
        """Objects of a PPG reply; empty means the model found nothing."""

    def ask_verification(self, expression: str, box: Box, size: Size) -> str:
        """Does this region show the expression? Answered yes or no in one token."""
