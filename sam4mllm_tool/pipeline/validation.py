"""What a query must look like before a model is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sam4mllm_tool.errors import (
    ExpressionError,
    InputError,
    PointOutsideImage,
    PromptError,
    nearest,
)
from sam4mllm_tool.types import Point, RgbImage, TargetCount

MAX_EXPRESSION = 2_000
MAX_POINTS = 1_000


def check_expression(expression: str) -> str:
    """The expression on one line, without outer white space.

    Raises:
        ExpressionError: not a text, nothing left, or more than ``MAX_EXPRESSION`` characters.
    """
    if not isinstance(expression, str):
        raise ExpressionError(
            f"the expression is {type(expression).__name__}, not a text",
            hint="Describe the object, e.g. 'the red apple'.",
        )
    text = " ".join(expression.split())
    if not text:
        raise ExpressionError(
            "the expression is empty", hint="Describe the object, e.g. 'the red apple'."
        )
    if len(text) > MAX_EXPRESSION:
        raise ExpressionError(
            f"the expression has {len(text)} characters, the limit is {MAX_EXPRESSION}",
            hint="Describe one object, or one group of objects, in a sentence.",
        )
    return text


def check_count(count: TargetCount | str) -> TargetCount:
    """The count, from its value or its text.

    Raises:
        InputError: not one of them.
    """
    try:
        return TargetCount(count)
    except ValueError as error:
        raise InputError(
            f"{str(count)[:60]!r} is not a count",
            hint=nearest(str(count), [known.value for known in TargetCount], "Counts"),
        ) from error


def check_image_points(points: Sequence[Point], image: RgbImage) -> None:
    """Raise PromptError or PointOutsideImage unless all points lie on the image."""
    if not points:
        raise PromptError("no points were given", hint="Give at least one point (x, y).")
    if len(points) > MAX_POINTS:
        raise PromptError(
            f"{len(points)} points were given, the limit is {MAX_POINTS}",
            hint="Ask about fewer points: a few dozen are enough for one object.",
        )
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            raise PromptError(f"the point ({x}, {y}) is not finite", hint="Give pixel numbers.")
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise PointOutsideImage(
                f"the point ({x:g}, {y:g}) lies outside the image",
                hint=f"x goes from 0 to {image.width}, y from 0 to {image.height}, exclusive.",
            )
