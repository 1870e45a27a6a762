"""Browser sessions: each has a workspace of its own, what is on its page, and a way back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
from sam4mllm_integrations.mcp_work import Limits

from sam4mllm_tool.concurrency import run_in_thread
from sam4mllm_tool.errors import Busy, InputError, UnknownHandle
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.playground.board import Board, Step, named_handles
from sam4mllm_tool.tools.registry import ToolOutput
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import ObjectRecord, Workspace

MOST_STEPS = 300
"""Calls on one page."""
MOST_UNDO = 200
"""How many changes can be undone."""


@dataclass(frozen=True)
class Former:
    """Where a change began.

    Attributes:
        board: what was on the page.
        record: the object that the change was about, without mask and logits: a mask never changes
            under its handle, so it need not be kept twice.
        had_mask: whether that object had a mask.
    """

    board: Board
    record: ObjectRecord | None = None
    had_mask: bool = False


@dataclass
class Session:
    """One browser's workspace and page.

    Attributes:
        toolbox: over the session's own workspace.
        board: what is on the page.
        former: where the changes began, the last one last.
        lock: one change at a time.
        last_use: when it was heard of last, on the monotonic clock.
    """

    toolbox: Toolbox
    board: Board = field(default_factory=Board)
    former: deque[Former] = field(default_factory=lambda: deque(maxlen=MOST_UNDO))
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    last_use: float = field(default_factory=time.monotonic)

    @property
    def workspace(self) -> Workspace:
        """The session's pictures and objects."""
        return self.toolbox.workspace

    async def open_picture(self, source: str | bytes, name: str = "") -> None:
        """Start over with another picture.

        Raises:
            ImageError, AccessDenied: as :func:`sam4mllm_tool.load_image`.
        """
        record = await run_in_thread(partial(self.workspace.open_image, source, name=name))
        self.former.clear()
        self.board = Board(record.image_id)

    async def call(self, tool: str, arguments: Mapping[str, Any], panel: str) -> ToolOutput:
        """Make a tool call and put what it made on the page; a cancelled one leaves no trace there.

        Raises:
            InputError: too many calls on one page, or as :meth:`Toolbox.call`.
            DialogueError, BackendError: as :meth:`Toolbox.call`.
        """
        if len(self.board.steps) >= MOST_STEPS:
            raise InputError(f"{MOST_STEPS} calls are on this page", hint="Clear it first.")
        begun = time.monotonic()
        before = self.record(str(arguments.get("object_id", "")))
        known = {one.object_id for one in self.workspace.objects()}
        output = await self.toolbox.acall(tool, arguments)
        result = output.result.model_dump(mode="json")
        step = Step(tool, dict(arguments), result, round(time.monotonic() - begun, 3))
        handles = dict.fromkeys(handle for handle, _ in named_handles(result))
        new = tuple(handle for handle in handles if handle not in known)
        self._go_on(self.board.after(step, new, panel, output.trace), before)
        return output

    def remove(self, object_id: str) -> None:
        """Take an object off the page."""
        self._go_on(self.board.without(object_id))

    def undo(self) -> None:
        """Go back by one change.

        Raises:
            InputError: there is none to undo.
        """
        if not self.former:
            raise InputError("there is nothing to undo", hint="Nothing has been changed yet.")
        former = self.former.pop()
        self.board = former.board
        self._restore(former)

    def clear(self) -> None:
        """Take all objects off the page and forget the calls; the picture stays."""
        self._go_on(Board(self.board.image_id))

    def record(self, object_id: str) -> ObjectRecord | None:
        """The object of that handle; ``None`` if the workspace has forgotten it."""
        try:
            return self.workspace.object(object_id) if object_id else None
        except UnknownHandle:
            return None

    def _go_on(self, board: Board, about: ObjectRecord | None = None) -> None:
        bare = None if about is None else replace(about, drawn=None, mask=None)
        had_mask = about is not None and about.mask is not None
        self.former.append(Former(self.board, bare, had_mask))
        self.board = board

    def _restore(self, former: Former) -> None:
        """Give an object its points back, and take away a mask that it did not have."""
        now = self.record(former.record.object_id) if former.record else None
        if former.record is None or now is None:
            return
        drawn, mask = (now.drawn, now.mask) if former.had_mask else (None, None)
        self.workspace.update_object(replace(former.record, drawn=drawn, mask=mask))


class Sessions:
    """All sessions. None is pushed out by another: beyond the bounds new ones are refused.

    Args:
        model: whose models and tools all sessions share.
        policy: which files and addresses may be opened.
        limits: how many sessions, how long, how much memory.
    """

    def __init__(self, model: Toolbox, policy: ImagePolicy, limits: Limits) -> None:
        self._model = model
        self._policy = policy
        self._limits = limits
        self._known: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, key: str) -> Session:
        """The session of a key that this server issued.

        Raises:
            Busy: it is new, and there are as many as there may be.
        """
        self._forget_idle()
        session = self._known.get(key)
        if session is None:
            if len(self._known) >= self._limits.clients:
                raise Busy(f"{len(self._known)} browser sessions are open", retry_after=60)
            session = self._known[key] = Session(self._model.for_workspace(self._workspace()))
        session.last_use = time.monotonic()
        return session

    def _workspace(self) -> Workspace:
        return Workspace(
            self._policy,
            max_bytes=self._limits.client_bytes,
            room=lambda: self._limits.memory_bytes - self._bytes_kept,
        )

    @property
    def _bytes_kept(self) -> int:
        return sum(one.workspace.bytes_kept for one in list(self._known.values()))

    def _forget_idle(self) -> None:
        oldest = time.monotonic() - self._limits.idle_seconds
        for key, session in list(self._known.items()):
            if session.last_use < oldest and not session.lock.statistics().locked:
                del self._known[key]
