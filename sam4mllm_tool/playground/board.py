"""The contents of a session's page as immutable values: undo restores an earlier one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sam4mllm_tool.pipeline.trace import Trace


@dataclass(frozen=True)
class Shown:
    """An object on the page.

    Attributes:
        number: its number on the page and in the overlay, which also gives its colour. It stays
            the same when a refinement gives the object a new handle.
        panel: ``"a"``, or ``"b"`` for the right side of a comparison.
        trace: trace of the call that found it by its expression.
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
    """A picture, the objects on it, and the tool calls so far.

    Attributes:
        image_id: handle of the picture; "" before one is opened.
        relations: pairs of the last comparison.
    """

    image_id: str = ""
    shown: tuple[Shown, ...] = ()
    steps: tuple[Step, ...] = ()
    relations: tuple[Mapping[str, Any], ...] = ()

    def after(self, step: Step, new: tuple[str, ...], panel: str, trace: Trace | None) -> Board:
        """The board after a call that created the objects ``new``.

        A call with an ``object_id`` that creates exactly one object is a refinement: the new object
        replaces the old one.
        """
        board = replace(self, steps=(*self.steps, step))
        if "pairs" in step.result:
            board = replace(board, relations=tuple(step.result["pairs"]))
        refined = self.find(str(step.arguments.get("object_id", "")))
        if refined is not None and len(new) == 1:
            replacement = replace(refined, object_id=new[0])
            shown = tuple(replacement if one is refined else one for one in self.shown)
            return replace(board, shown=shown, relations=())
        for object_id in new:
            added = Shown(object_id, board._number_for(panel, trace), panel, trace)
            board = replace(board, shown=(*board.shown, added))
        return board

    def without(self, object_id: str) -> Board:
        """The board without an object; relations are cleared, since they may refer to it."""
        remaining = tuple(one for one in self.shown if one.object_id != object_id)
        return replace(self, shown=remaining, relations=())

    def find(self, object_id: str) -> Shown | None:
        """The object of that handle, if it is on the page."""
        return next((one for one in self.shown if one.object_id == object_id), None)

    def _number_for(self, panel: str, trace: Trace | None) -> int:
        """The lowest number that is free on the panel.

        If the same expression found an object on the other panel, its number is used again, so that
        the two objects have the same colour.
        """
        used = {one.number for one in self.shown if one.panel == panel}
        same_expression = [
            one.number
            for one in self.shown
            if one.panel != panel and one.trace and trace
            if one.trace.expression == trace.expression
        ]
        return next(n for n in (*same_expression, *range(1, len(used) + 2)) if n not in used)


def named_handles(value: Any) -> Iterator[tuple[str, str]]:
    """Every object handle in a tool's result, with the Python path to it.

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
