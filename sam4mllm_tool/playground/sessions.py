"""Browser sessions: each has its own workspace, page and undo history."""

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

MAX_STEPS = 300
"""Tool calls per page."""
MAX_UNDO = 200
"""Changes that can be undone."""


@dataclass(frozen=True)
class UndoEntry:
    """The state before a change.

    Attributes:
        board: the contents of the page.
        record: the object that the change refers to, without mask and logits: once drawn, these
            never change under a handle, so no second copy is needed.
        had_mask: whether that object had a mask then.
    """

    board: Board
    record: ObjectRecord | None = None
    had_mask: bool = False


@dataclass
class Session:
    """One browser's workspace and page.

    Attributes:
        toolbox: the tools, with the session's own workspace.
        board: the contents of the page.
        history: the states before each change, the latest last.
        lock: held during a change, so that there is one at a time.
        last_use: time of the last request, in seconds of the monotonic clock.
    """

    toolbox: Toolbox
    board: Board = field(default_factory=Board)
    history: deque[UndoEntry] = field(default_factory=lambda: deque(maxlen=MAX_UNDO))
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
        self.history.clear()
        self.board = Board(record.image_id)

    async def call(self, tool: str, arguments: Mapping[str, Any], panel: str) -> ToolOutput:
        """Run a tool call and show its objects; a cancelled call does not change the page.

        Raises:
            InputError: too many calls on one page, or as :meth:`Toolbox.call`.
            DialogueError, BackendError: as :meth:`Toolbox.call`.
        """
        if len(self.board.steps) >= MAX_STEPS:
            raise InputError(
                f"the page has its maximum of {MAX_STEPS} calls", hint="Clear it first."
            )
        started = time.monotonic()
        before = self.record(str(arguments.get("object_id", "")))
        known = {one.object_id for one in self.workspace.objects()}
        output = await self.toolbox.acall(tool, arguments)
        result = output.result.model_dump(mode="json")
        step = Step(tool, dict(arguments), result, round(time.monotonic() - started, 3))
        handles = dict.fromkeys(handle for handle, _ in named_handles(result))
        new = tuple(handle for handle in handles if handle not in known)
        self._commit(self.board.after(step, new, panel, output.trace), before)
        return output

    def remove(self, object_id: str) -> None:
        """Remove an object from the page."""
        self._commit(self.board.without(object_id))

    def undo(self) -> None:
        """Undo the last change.

        Raises:
            InputError: there is no change to undo.
        """
        if not self.history:
            raise InputError("there is nothing to undo", hint="Nothing has been changed yet.")
        entry = self.history.pop()
        self.board = entry.board
        self._restore(entry)

    def clear(self) -> None:
        """Remove all objects and calls from the page; the picture stays."""
        self._commit(Board(self.board.image_id))

    def record(self, object_id: str) -> ObjectRecord | None:
        """The object of that handle; ``None`` if the workspace no longer has it."""
        try:
            return self.workspace.object(object_id) if object_id else None
        except UnknownHandle:
            return None

    def _commit(self, board: Board, about: ObjectRecord | None = None) -> None:
        bare = None if about is None else replace(about, drawn=None, mask=None)
        had_mask = about is not None and about.mask is not None
        self.history.append(UndoEntry(self.board, bare, had_mask))
        self.board = board

    def _restore(self, entry: UndoEntry) -> None:
        """Restore an object's earlier points, and remove a mask that it did not have then."""
        now = self.record(entry.record.object_id) if entry.record else None
        if entry.record is None or now is None:
            return
        drawn, mask = (now.drawn, now.mask) if entry.had_mask else (None, None)
        self.workspace.update_object(replace(entry.record, drawn=drawn, mask=mask))


class Sessions:
    """All browser sessions. Beyond the limits new ones are refused; none is dropped for another.

    Args:
        toolbox: the tools and models that all sessions share.
        policy: which files and URLs may be opened.
        limits: number of sessions, idle time and memory.
    """

    def __init__(self, toolbox: Toolbox, policy: ImagePolicy, limits: Limits) -> None:
        self._toolbox = toolbox
        self._policy = policy
        self._limits = limits
        self._known: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, key: str) -> Session:
        """The session of a key that this server issued.

        Raises:
            Busy: the key is new, and the maximum number of sessions is open.
        """
        self._forget_idle()
        session = self._known.get(key)
        if session is None:
            if len(self._known) >= self._limits.clients:
                raise Busy(f"{len(self._known)} browser sessions are open", retry_after=60)
            session = self._known[key] = Session(self._toolbox.for_workspace(self._workspace()))
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
