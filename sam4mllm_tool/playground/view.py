"""A session's page as one JSON document: the browser draws it and keeps no state itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sam4mllm_tool.drawing.html import as_hex
from sam4mllm_tool.drawing.overlay import colour_of, is_bright
from sam4mllm_tool.playground.board import Shown
from sam4mllm_tool.playground.pictures import shown_size
from sam4mllm_tool.playground.script import as_json, as_python
from sam4mllm_tool.playground.sessions import Session
from sam4mllm_tool.tools.records import ObjectRecord


@dataclass(frozen=True)
class About:
    """What the page shows about the models.

    Attributes:
        loading: Python expression that loads them, for the script to copy.
        command: for embedded models, how to start with a real checkpoint; else "".
    """

    mllm: str
    segmenter: str
    loading: str
    command: str = ""
    caution: str = ""


def page_state(session: Session, about: About) -> dict[str, Any]:
    """Everything the page shows; coordinates are pixels of the upright picture."""
    board = session.board
    picture = _picture(session) if board.image_id else None
    name = picture["name"] if picture else ""
    shown = [(one, session.record(one.object_id)) for one in board.shown]
    return {
        "picture": picture,
        "objects": [
            _object(one, record)
            for one, record in shown
            if record is not None and record.image_id == board.image_id
        ],
        "relations": list(board.relations),
        "steps": [asdict(step) for step in board.steps],
        "json": as_json(board.steps),
        "python": as_python(board.steps, about.loading, board.image_id, name),
        "can_undo": bool(session.history),
    }


def _picture(session: Session) -> dict[str, Any]:
    record = session.workspace.image(session.board.image_id)
    width, height = shown_size(*record.image.size)
    return {
        "image_id": record.image_id,
        "name": record.file_name,
        "width": record.image.width,
        "height": record.image.height,
        "shown_width": width,
        "shown_height": height,
        "notes": list(record.notes),
        "address": f"/pictures/{record.image_id}?{record.image.digest[:16]}",
    }


def _object(shown: Shown, record: ObjectRecord) -> dict[str, Any]:
    colour = colour_of(shown.number)
    mask = record.mask
    return {
        "object_id": record.object_id,
        "number": shown.number,
        "panel": shown.panel,
        "colour": as_hex(colour),
        "ink": "#000" if is_bright(colour) else "#fff",
        "name": record.name,
        "strategy": shown.trace.strategy if shown.trace else "",
        "box": list(record.box),
        "score": record.score,
        "area": mask.area if mask else None,
        "predicted_iou": record.drawn.predicted_iou if record.drawn else None,
        "can_be_asked": record.location is not None,
        "has_trace": shown.trace is not None,
        "points": [
            {
                **asdict(point),
                "label": point.label.value,
                "in_mask": mask.contains(point.x, point.y) if mask else None,
            }
            for point in record.points
        ],
        "mask": _mask_address(shown, record),
    }


def _mask_address(shown: Shown, record: ObjectRecord) -> str | None:
    """URL of the mask; with its area, so that no cached mask of an earlier session is used."""
    if record.mask is None:
        return None
    return f"/masks/{record.object_id}?number={shown.number}&area={record.mask.area}"
