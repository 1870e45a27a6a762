"""Calls that may be repeated: what one makes is kept at its end with its answer, or not at all.

A client that did not hear the answer repeats the call under the same id, to this process or to
another one with the same workspace, and gets the answer of the first; nothing is made twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from sam4mllm_tool.tools.records import ObjectRecord


@dataclass
class Call:
    """One call at a workspace.

    Attributes:
        workspace: whose objects it makes.
        id: chosen by the client, different for each of its calls.
        answer: as text; known from the start if the call was answered before.
        made: objects that it has made or changed, by handle, not kept yet.
    """

    workspace: object
    id: str
    answer: str | None = None
    made: dict[str, ObjectRecord] = field(default_factory=dict)


_current: ContextVar[Call | None] = ContextVar("sam4mllm_repeatable_call", default=None)


@contextmanager
def current(call: Call) -> Iterator[Call]:
    """Make ``call`` the one that this thread or task works on within the ``with`` block."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def made_by_current(workspace: object) -> dict[str, ObjectRecord] | None:
    """What the present call at the workspace has made; ``None`` outside of one."""
    call = _current.get()
    return call.made if call is not None and call.workspace is workspace else None


class Turns:
    """Of several calls of one id in this process, one at a time is worked on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Wait for the others of that name."""
        with self._lock:
            turn, users = self._turns.get(name, (threading.Lock(), 0))
            self._turns[name] = turn, users + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                turn, users = self._turns.pop(name)
                if users > 1:
                    self._turns[name] = turn, users - 1
