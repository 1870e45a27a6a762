"""One expression to be judged, and where it comes from: a data set or the scene generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sam4mllm_tool.datasets import ReferringExample
from sam4mllm_tool.types import Box, Mask, RgbImage, TargetCount


@dataclass(frozen=True)
class Case:
    """An expression with its truth; the picture is opened and the masks decoded when asked for.

    Attributes:
        case: unique id within a run.
        image: id of the picture; cases on one picture follow each other.
        boxes: of the targets, pixels; empty without target.
        count: what the model is told about the number of targets.
        kind: of expression.
        ask_presence: also ask, as a question of its own, whether there is a target at all.
    """

    case: str
    image: str
    expression: str
    open_image: Callable[[], RgbImage]
    truth: Callable[[], list[Mask]]
    boxes: tuple[Box, ...]
    ignore: Callable[[], Mask | None] = lambda: None
    count: TargetCount = TargetCount.ONE
    kind: str = ""
    ask_presence: bool = False


def cases_of(examples: Iterable[ReferringExample]) -> Iterator[Case]:
    """A case an expression."""
    for example in examples:
        for name, expression in example.cases():
            yield Case(
                case=name,
                image=example.image_id,
                expression=expression,
                open_image=example.open_image,
                truth=example.truth,
                boxes=example.boxes,
                ignore=example.ignored,
                count=example.count,
                kind=example.kind,
            )
