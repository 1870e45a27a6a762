"""What one browser session has on its page, as values: undoing is going back to a former one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sam4mllm_tool.pipeline.trace import Trace


@dataclass(frozen=True)
class Shown:
    """An object on the page.

    Attributes:
        number: what the page and the overlay call it, which gives its colour; it stays when the
            object is refined under another handle.
        panel: ``"a"``, or ``"b"`` for the right side of a comparison.
        trace: of the call that found it by its expression.
    """

    object_id: str
    number: int
    panel: str
    trace: Trace | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Step:
    """A tool call that was made, with its result as JSON (masks left out)."""

    tool: str
    arguments: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Board:
    """A picture, the objects on it, and the calls that led there.

    Attributes:
        image_id: handle of the picture; "" before one was opened.
        relations: pairs of the last comparison.
    """

    image_id: str = ""
    shown: tuple[Shown, ...] = ()
    steps: tuple[Step, ...] = ()
    relations: tuple[Mapping[str, Any], ...] = ()

    def after(self, step: Step, new: tuple[str, ...], panel: str, trace: Trace | None) -> Board:
        """The board after a call that made the objects ``new``.

        A call about an object that makes one new object refines it: the new one takes its place.
        """
        board = replace(self, steps=(*self.steps, step))
        if "pairs" in step.result:
            board = replace(board, relations=tuple(step.result["pairs"]))
        former = self.find(str(step.arguments.get("object_id", "")))
        if former is not None and len(new) == 1:
            refined = replace(former, object_id=new[0])
            shown = tuple(refined if one is former else one for one in self.shown)
            return replace(board, shown=shown, relations=())
        for object_id in new:
            added = Shown(object_id, board._number_for(panel, trace), panel, trace)
            board = replace(board, shown=(*board.shown, added))
        return board

    def without(self, object_id: str) -> Board:
        """The board without an object, and without relations that may be about it."""
        left = tuple(one for one in self.shown if one.object_id != object_id)
        return replace(self, shown=left, relations=())

    def find(self, object_id: str) -> Shown | None:
        """The object of that handle, if it is on the page."""
        return next((one for one in self.shown if one.object_id == object_id), None)

    def _number_for(self, panel: str, trace: Trace | None) -> int:
        """The first number that no object of the panel has.

        On the right side it is the number of the object on the left that the same expression
        found, so that what is compared has the same colour.
        """
        used = {one.number for one in self.shown if one.panel == panel}
        alike = [
            one.number
            for one in self.shown
            if one.panel != panel and one.trace and trace
            if one.trace.expression == trace.expression
        ]
        return next(n for n in (*alike, *range(1, len(used) + 2)) if n not in used)


def named_handles(value: Any) -> Iterator[tuple[str, str]]:
    """Every object handle in a tool's result with the Python expression that reaches it.

    ``{"objects": [{"object_id": "obj_1"}]}`` gives ``("obj_1", ".objects[0].object_id")``.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == "object_id" and isinstance(part, str):
                yield part, f".{key}"
            else:
                yield from ((handle, f".{key}{path}") for handle, path in named_handles(part))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from ((handle, f"[{number}]{path}") for handle, path in named_handles(part))
