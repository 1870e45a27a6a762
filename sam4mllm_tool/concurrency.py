"""What surrounds a call: cancelling it, and telling how far it has got.

A call's context travels in a ``ContextVar``, so that backends can ask "does anyone still want
this?" between two forward passes without a parameter in every signature. Without a context both
functions do nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class CallCancelled(Exception):
    """The caller has gone; raised inside the worker thread and never shown to anyone."""


@dataclass(frozen=True)
class CallContext:
    """One call's cancel flag and progress listener.

    Attributes:
        on_stage: called with a short stage name each time a stage of the flow begins.
    """

    on_stage: Callable[[str], None] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


_current: contextvars.ContextVar[CallContext | None] = contextvars.ContextVar(
    "sam4mllm_call", default=None
)


@contextmanager
def call_context(context: CallContext) -> Iterator[CallContext]:
    """Make ``context`` the current one within the ``with`` block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def check_cancelled() -> None:
    """Raise :class:`CallCancelled` if the current call is no longer wanted."""
    context = _current.get()
    if context is not None and context.cancelled.is_set():
        raise CallCancelled


def stage(name: str) -> None:
    """Report that a stage begins, after checking that the call is still wanted."""
    check_cancelled()
    context = _current.get()
    if context is not None and context.on_stage is not None:
        context.on_stage(name)


async def run_in_thread(
    function: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run a blocking call in a worker thread; cancelling the awaiting task cancels the call.

    The call stops at its next check, so that the model's turn is free for the next caller.
    An ``on_stage`` listener of the surrounding context is kept.
    """
    outer = _current.get()
    context = CallContext(on_stage=outer.on_stage if outer else None)
    runner = contextvars.copy_context()
    runner.run(_current.set, context)
    loop = asyncio.get_running_loop()
    call = functools.partial(function, *args, **kwargs)
    future = loop.run_in_executor(None, functools.partial(runner.run, call))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        context.cancelled.set()
        # Nobody will look at the worker's exception; asking for it keeps asyncio quiet.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


_POLL_SECONDS = 0.05


class FairTurn:
    """A lock handed out in the order of asking, one forward pass at a time.

    A plain ``threading.Lock`` may let one busy thread take it again and again. While a caller
    waits, its call is checked for cancellation, so that a queue of gone callers empties itself.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Callers in the queue, whoever has the turn left out."""
        return max(0, len(self._queue) - 1)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the turn within the ``with`` block.

        Raises:
            CallCancelled: the current call is no longer wanted.
        """
        ticket = object()
        with self._condition:
            self._queue.append(ticket)
        try:
            self._wait_for(ticket)
            check_cancelled()
            yield
        finally:
            with self._condition:
                self._queue.remove(ticket)
                self._condition.notify_all()

    def _wait_for(self, ticket: object) -> None:
        with self._condition:
            while self._queue[0] is not ticket:
                self._condition.wait(_POLL_SECONDS)
                check_cancelled()
