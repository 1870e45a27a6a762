"""The files that a session's page can be saved as."""

from __future__ import annotations

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.playground import pictures
from sam4mllm_tool.playground.pictures import File
from sam4mllm_tool.playground.sessions import Session
from sam4mllm_tool.playground.view import About, page_state


def saved_file(session: Session, about: About, file: str, panel: str) -> File:
    """The file of that name, and its media type.

    Args:
        session: the session whose page is saved.
        about: describes the models.
        file: ``overlay.png``, ``coco.json``, ``picture.png``, ``calls.json``, ``calls.py``, or an
            object's handle with ``.png`` (its mask), ``.json`` or ``.html`` (its trace).
        panel: the side of a comparison for the overlay and the COCO document.

    Raises:
        InputError: there is no such file.
    """
    image = session.workspace.image(session.board.image_id)
    pairs = [(one, session.record(one.object_id)) for one in session.board.shown]
    objects = [(one, record) for one, record in pairs if record and one.panel == panel]
    stem, _, suffix = file.rpartition(".")
    match file:
        case "overlay.png":
            masks = {one.number: record.mask for one, record in objects if record.mask}
            return pictures.overlay_download(image, masks)
        case "coco.json":
            return pictures.coco_download(image, [record for _, record in objects])
        case "picture.png":
            return pictures.full_download(image)
        case "calls.json" | "calls.py":
            text = page_state(session, about)["json" if suffix == "json" else "python"]
            return text.encode(), "text/plain; charset=utf-8"
    shown = session.board.find(stem)
    record = session.record(stem)
    if suffix == "png" and record is not None and record.mask is not None:
        return pictures.mask_download(record)
    if suffix in ("html", "json") and shown is not None and shown.trace is not None:
        return pictures.trace_download(shown.trace, image, suffix)
    raise InputError(f"there is nothing to save as {file[:60]!r}")
