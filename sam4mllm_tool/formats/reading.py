"""Tolerant readers for the replies of models that were not fine-tuned for this dialogue.

Replies may follow a thought, be surrounded by prose or code fences, or be JSON that is truncated or
uses single quotes. So boxes and points are found by their shape (four or two numbers in
brackets) rather than by parsing a whole document; a key like ``bbox_2d`` only decides which of
several groups are meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.formats.base import BoxesRead
from sam4mllm_tool.formats.grids import Grid, Size
from sam4mllm_tool.types import Box, Point

Numbers = tuple[float, ...]
MAX_BOXES = 64
"""Boxes beyond this number are dropped: a model stuck in a loop repeats them without end."""

_NUMBER = r"([-+]?\d{1,12}(?:\.\d{1,12})?)"
_GAP = r"[\s,]{1,9}"
_OPEN, _CLOSE = r"[\[(]\s{0,9}", r"\s{0,9}[\])]"
_PAIR = _OPEN + _NUMBER + _GAP + _NUMBER + _CLOSE
_FOUR = _OPEN + _GAP.join([_NUMBER] * 4) + _CLOSE
_CORNERS = _PAIR + r"[\s,]{0,9}" + _PAIR
_NAMED = r"\W{1,9}".join(
    rf"{axis}_?(?:{end})\W{{1,4}}{_NUMBER}" for end in ("min|1", "max|2") for axis in "xy"
)
_KEY = r"[\"']?(?:bbox_2d|box_2d|bbox|bounding_box|box)[\"']?\s{0,9}[:=]\s{0,9}\[?\s{0,9}"
_BOX_SHAPES = tuple(
    re.compile(shape, re.IGNORECASE) for shape in (_KEY + _FOUR, _FOUR, _CORNERS, _NAMED)
)
_PICTURE = r"(?:image|picture|photo|scene)"
_NOTHING = re.compile(
    r"\[\s{0,9}\]"
    r"|\b(?:none|null|nothing)\b"
    r"|\bno (?:such |matching )?(?:object|target|match|box|region|instance)"
    rf"|\bno\b[^.\n]{{0,80}}\b(?:{_PICTURE}|found|present|visible|detected|here)\b"
    r"|(?:n[’']t|\bnot|\bcannot)\b[^.\n]{0,60}"
    rf"\b(?:found|find|present|visible|see|locate|contain|appear|exist|depict|show|there|{_PICTURE})",
    re.IGNORECASE,
)
_BLIND = re.compile(
    rf"\bno {_PICTURE}"
    r"|\b(?:see|view|access|open|process|analy[sz]e) (?:an? |any |the |this |your )?"
    rf"{_PICTURE}",
    re.IGNORECASE,
)


def answer_part(reply: str) -> str:
    """The reply without the thoughts before it, and inside ``<answer>`` tags if there are any.

    Raises:
        DialogueError: a thought was never closed; boxes inside a thought are not an answer.
    """
    text = reply.rsplit("</think>", 1)[-1]
    if "<think>" in text:
        raise DialogueError(
            "the reply ends inside a thought",
            raw_reply=reply,
            hint="Raise the thinking budget (thought_budget=…).",
        )
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL | re.IGNORECASE)
    return tagged[-1] if tagged else text


def says_nothing_there(reply: str) -> bool:
    """Whether a reply without a box states that the object is not in the picture."""
    bare_no = reply.strip(" .!\n\t\"'").lower() == "no"
    return bare_no or bool(_NOTHING.search(reply) and not _BLIND.search(reply))


def four_numbers(reply: str) -> list[Numbers]:
    """Every group of four numbers, as the first of these shapes that occurs at all:
    ``"bbox_2d": [a, b, c, d]``, ``[a, b, c, d]``, ``(a, b), (c, d)``, ``x_min: a, y_min: b, …``.
    """
    for shape in _BOX_SHAPES:
        found = [tuple(map(float, numbers)) for numbers in shape.findall(reply)]
        if found:
            return list(dict.fromkeys(found))
    return []


def two_numbers(text: str) -> list[Numbers]:
    """Every ``[a, b]`` or ``(a, b)``."""
    return [(float(a), float(b)) for a, b in re.findall(_PAIR, text)]


def read_boxes(
    reply: str,
    size: Size,
    grid: Grid,
    find: Callable[[str], list[Numbers]] = four_numbers,
    *,
    y_first: bool = False,
) -> BoxesRead:
    """Boxes of a reply in pixels of the image; empty if the reply says that nothing is there.

    Args:
        reply: the model's text, with anything around the boxes.
        size: (width, height) of the upright image in pixels.
        grid: the grid the numbers are in.
        find: finds the groups of four numbers.
        y_first: the numbers are y_min, x_min, y_max, x_max.

    Raises:
        DialogueError: neither a box nor a statement that nothing is there.
    """
    answer = answer_part(reply)
    found = find(answer)
    if not found:
        if says_nothing_there(answer):
            return BoxesRead(())
        raise DialogueError(
            "the reply contains no bounding box",
            raw_reply=reply,
            hint="Rephrase the expression; if this always happens, choose the dialogue format of "
            "this model family.",
        )
    notes = [f"only the first {MAX_BOXES} boxes were read"] if len(found) > MAX_BOXES else []
    boxes = []
    for numbers in found[:MAX_BOXES]:
        box, remarks = place_box(numbers, size, grid, y_first=y_first)
        boxes.append(box)
        notes += remarks
    return BoxesRead(tuple(boxes), tuple(dict.fromkeys(notes)))


def place_box(
    numbers: Numbers, size: Size, grid: Grid, *, y_first: bool = False
) -> tuple[Box, list[str]]:
    """Four numbers of the grid → a box inside the image, with notes on what was corrected."""
    notes = []
    right, bottom = grid.extent(size)
    a, b, c, d = (numbers[i] for i in ((1, 0, 3, 2) if y_first else (0, 1, 2, 3)))
    if max(a, b, c, d) <= 1 < right and any(n != int(n) for n in (a, b, c, d)):
        a, c, b, d = a * right, c * right, b * bottom, d * bottom
        notes.append("a box was given in fractions of the image (0 to 1)")
    if c < a or d < b:
        notes.append("a box with swapped corners was corrected")
    x = _interval(a, c, right)
    y = _interval(b, d, bottom)
    if min(a, b, c, d) < 0 or max(a, c) > right or max(b, d) > bottom:
        notes.append("a coordinate off the scale was clamped")
    if a == c or b == d:
        notes.append("an empty box was widened to one grid cell")
    x_unit, y_unit = size[0] / right, size[1] / bottom
    return Box(x[0] * x_unit, y[0] * y_unit, x[1] * x_unit, y[1] * y_unit), notes


def place_point(numbers: Numbers, size: Size, grid: Grid, *, y_first: bool = False) -> Point:
    """Two numbers of the grid → a point inside the image (clamped to it)."""
    x, y = reversed(numbers) if y_first else numbers
    right, bottom = grid.extent(size)
    # A point on the far edge lies in no pixel, so it is moved into the last one.
    return Point(
        min(max(x / right, 0.0) * size[0], size[0] - 0.5),
        min(max(y / bottom, 0.0) * size[1], size[1] - 0.5),
    )


def _interval(one: float, other: float, extent: float) -> tuple[float, float]:
    """Ascending, inside 0…extent, at least one unit long."""
    low, high = sorted(min(max(n, 0.0), extent) for n in (one, other))
    if high == low:
        low = min(max(low - 0.5, 0.0), extent - 1)
        high = low + 1
    return low, high
