"""Handles: what tools give an agent instead of pixels, and the records they refer to.

One workspace belongs to one user or client. It is bounded by bytes: what has not been used for
longest is forgotten first, and asking for it then raises :class:`UnknownHandle` ("has expired").
A handle is never given out twice.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cachetools import LRUCache

from sam4mllm_tool.errors import Busy, InputError, UnknownHandle
from sam4mllm_tool.images.access import ImagePolicy, readable_path
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.tools.calls import Call, Turns, current, made_by_current
from sam4mllm_tool.tools.records import ImageRecord, ObjectRecord, labelled_masks
from sam4mllm_tool.tools.state import WorkspaceState
from sam4mllm_tool.types import RgbImage

__all__ = ["ImageRecord", "ObjectRecord", "Workspace", "labelled_masks"]

R = TypeVar("R")

DEFAULT_BYTES = 1024**3
_OVERHEAD = 4096
_ANSWER_CHARACTERS = 1024**2


class Workspace:
    """Images and objects by handle; safe to use from many threads.

    Args:
        policy: which sources may be opened.
        max_bytes: bound on the pixels, masks and logits kept.
        room: says how many bytes more may be kept, where several workspaces share one bound.
        last_number: handles are numbered from the next one on; those before count as expired.
        state: keeps everything on disk too; what memory forgets or an earlier process kept is read
            from there.
    """

    def __init__(
        self,
        policy: ImagePolicy | None = None,
        *,
        max_bytes: int = DEFAULT_BYTES,
        room: Callable[[], int] | None = None,
        last_number: int = 0,
        state: WorkspaceState | None = None,
    ) -> None:
        self.policy = policy or ImagePolicy()
        self._room = room
        self._lock = threading.RLock()
        self._images: LRUCache[str, ImageRecord] = LRUCache(max_bytes // 2, _image_bytes)
        self._objects: LRUCache[str, ObjectRecord] = LRUCache(max_bytes // 2, _object_bytes)
        self._by_digest: LRUCache[str, str] = LRUCache(4096)
        self._by_file: LRUCache[tuple[Any, ...], str] = LRUCache(4096)
        self._state = state
        self._versions: dict[str, float] = {}
        kept = state.numbers() if state else {}
        self._numbers = {kind: max(last_number, kept.get(kind, 0)) for kind in ("img", "obj")}
        self._turns = Turns()
        self._answers: LRUCache[str, str] = LRUCache(_ANSWER_CHARACTERS, len)

    @property
    def bytes_kept(self) -> int:
        """Bytes of all images and objects kept."""
        return int(self._images.currsize + self._objects.currsize)

    @property
    def last_number(self) -> int:
        """The highest number in a handle that was given out."""
        return max(self._numbers.values())

    def open_image(self, source: Any, *, name: str = "") -> ImageRecord:
        """The image behind a handle, path, URL, data URI, bytes, PIL image or array.

        The same pixels get the same handle, and an unchanged file is not decoded twice. ``name``
        is what a new image is called; by default its path or URL.

        Raises:
            ImageError, AccessDenied, UnknownHandle: as :func:`sam4mllm_tool.load_image`.
        """
        if isinstance(source, str) and _number(source, "img") is not None:
            return self.image(source)
        key = self._file_key(source)
        with self._lock:
            known = self._by_file.get(key) if key else None
            if known is not None and known in self._images:
                return self._images[known]
        loaded = load_image(source, self.policy)
        label = str(source)[:200] if isinstance(source, str | Path) else type(source).__name__
        label = "data URI" if label.lstrip()[:5].lower() == "data:" else label
        with self._lock:
            record = self._keep_image(loaded.image, name[:200] or label, loaded.notes)
            if key:
                self._by_file[key] = record.image_id
        return record

    def image(self, image_id: str) -> ImageRecord:
        """The image of that handle.

        Raises:
            UnknownHandle: never given out, or expired since.
        """
        with self._lock:
            if image_id not in self._images:
                kept = self._state.image(image_id) if self._state else None
                if kept is None:
                    raise self._unknown("img", image_id, list(self._images))
                self._keep(self._images, image_id, kept)
            return self._images[image_id]

    def object(self, object_id: str) -> ObjectRecord:
        """The object of that handle.

        Raises:
            UnknownHandle: never given out, or expired since.
        """
        with self._lock:
            made = made_by_current(self) or {}
            if object_id in made:
                return made[object_id]
            version = self._state.version(object_id) if self._state else None
            if object_id in self._objects and version == self._versions.get(object_id):
                return self._objects[object_id]
            kept = self._state.object(object_id) if self._state else None
            if kept is None:
                raise self._unknown("obj", object_id, list(self._objects))
            if version is not None:
                self._versions[object_id] = version
            return self._keep(self._objects, object_id, kept)

    def add_object(self, record: ObjectRecord) -> ObjectRecord:
        """Keep a new object; returns it with its handle.

        Raises:
            Busy: the memory shared with other workspaces is full of theirs.
        """
        with self._lock:
            object_id = self._next("obj")
            return self._store_object(
                replace(record, object_id=object_id, number=self._numbers["obj"])
            )

    def update_object(self, record: ObjectRecord) -> ObjectRecord:
        """Put a new value behind the record's handle.

        Raises:
            UnknownHandle: expired since.
        """
        with self._lock:
            number = self.object(record.object_id).number
            return self._store_object(replace(record, number=number))

    def objects(self, image_id: str | None = None) -> list[ObjectRecord]:
        """All objects (of an image), oldest handle first."""
        with self._lock:
            if self._state:
                records = [self.object(handle) for handle in self._state.objects_of(image_id)]
            else:
                records = list(self._objects.values())
            made = made_by_current(self) or {}
            records = [*(r for r in records if r.object_id not in made), *made.values()]
        kept = [r for r in records if image_id is None or r.image_id == image_id]
        return sorted(kept, key=lambda record: record.number)

    @contextmanager
    def once(self, call_id: str) -> Iterator[Call]:
        """A call that may be repeated, see :mod:`sam4mllm_tool.tools.calls`.

        The block sets the call's answer, unless it has one already. What it makes is kept with
        that answer when it ends; a block that raises leaves nothing. With state, "when it ends" is
        one transaction on disk, and of two processes that answer one call the first counts.
        """
        with self._turns.of(call_id):
            known = self._answers.get(call_id)
            if known is None and self._state:
                known = self._state.answer(call_id)
            with current(Call(self, call_id, known)) as call:
                yield call
            if known is None and (call.made or call.answer):
                with self._lock:
                    self._finish(call)

    def _finish(self, call: Call) -> None:
        answer = call.answer or ""
        if self._state is None:
            for record in call.made.values():
                self._keep(self._objects, record.object_id, record)
        else:
            rows = [self._state.object_row(record) for record in call.made.values()]
            earlier = self._state.write(rows, call.id, answer)
            if earlier is not None:
                call.answer = earlier
                return
            for row in rows:
                self._versions[row.handle] = row.version
                with suppress(InputError, Busy):  # where memory is full, it is read from disk
                    self._keep(self._objects, row.handle, call.made[row.handle])
        with suppress(ValueError):  # too long to be remembered
            self._answers[call.id] = answer

    def _keep_image(self, image: RgbImage, source: str, notes: tuple[str, ...]) -> ImageRecord:
        image_id = self._by_digest.get(image.digest)
        written = self._state.image_of(image.digest) if self._state else None
        image_id = image_id or written or self._next("img")
        self._by_digest[image.digest] = image_id
        if image_id not in self._images:
            self._keep(self._images, image_id, ImageRecord(image_id, image, source, notes))
        if self._state and written is None:
            self._state.write([self._state.image_row(self._images[image_id])])
        return self._images[image_id]

    def _store_object(self, record: ObjectRecord) -> ObjectRecord:
        if record.location is not None:  # its picture is for display, and may be forgotten before
            record = replace(record, location=replace(record.location, image=None))
        made = made_by_current(self)
        if made is not None:
            made[record.object_id] = record
            return record
        self._keep(self._objects, record.object_id, record)
        if self._state:
            row = self._state.object_row(record)
            self._state.write([row])
            self._versions[row.handle] = row.version
        return record

    def _file_key(self, source: Any) -> tuple[Any, ...] | None:
        """A key that changes when the file does; the policy is checked each time."""
        if isinstance(source, str) and ":" in source:
            return None
        if not isinstance(source, str | Path):
            return None
        path = readable_path(Path(source), self.policy)
        try:
            status = path.stat()
        except OSError:
            return None
        return path, status.st_ino, status.st_mtime_ns, status.st_size

    def _keep(self, cache: LRUCache[str, R], handle: str, record: R) -> R:
        try:
            self._make_room(int(cache.getsizeof(record)))
            cache[handle] = record
        except ValueError as error:
            raise InputError(
                f"{handle} is too large for this workspace",
                hint="Use a smaller picture, or a workspace with a larger max_bytes.",
            ) from error
        return record

    def _make_room(self, size: int) -> None:
        """Forget the oldest entries of this workspace until the shared memory has room."""
        while self._room is not None and self._room() < size:
            oldest = self._objects or self._images
            if not oldest:
                raise Busy("the memory for pictures is used by other clients", retry_after=60)
            oldest.popitem()

    def _unknown(self, kind: str, handle: str, known: list[str]) -> UnknownHandle:
        listed = ", ".join(known[-8:]) or "none"
        what = {"img": "image", "obj": "object"}[kind]
        number = _number(handle, kind)
        given = self._numbers[kind]
        if self._state:  # by another process, perhaps
            given = max(given, self._state.numbers()[kind])
        if number is not None and 0 < number <= given:
            return UnknownHandle(
                f"{handle} has expired", hint=f"Make the {what} again. Still known: {listed}."
            )
        return UnknownHandle(
            f"there is no {what} {handle[:60]!a}", hint=f"Known {what}s: {listed}."
        )

    def _next(self, kind: str) -> str:
        given = self._numbers[kind]
        self._numbers[kind] = self._state.next_number(kind, given) if self._state else given + 1
        return f"{kind}_{self._numbers[kind]}"


def _number(handle: str, kind: str) -> int | None:
    """The number in a handle; ``None`` for any other text, such as a file's name."""
    match = re.fullmatch(f"{kind}_([0-9]{{1,15}})", handle)
    return int(match[1]) if match else None


def _image_bytes(record: ImageRecord) -> int:
    return record.image.width * record.image.height * 3 + _OVERHEAD


def _object_bytes(record: ObjectRecord) -> int:
    mask = record.mask.pixels.nbytes if record.mask else 0
    logits = record.drawn.logits if record.drawn else None
    return mask + (0 if logits is None else logits.nbytes) + _OVERHEAD
