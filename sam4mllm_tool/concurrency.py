"""Cancellation and progress reporting for tool calls, and a fair lock for the models.

A call's context travels in a ``ContextVar``, so that backends can ask "is this still wanted?"
between two forward passes without a parameter in every signature. Without a context the functions
do nothing. The context holds a plain flag rather than anyio's cancel scope, because synchronous
callers cancel too, and ``task.cancel()`` of asyncio does not reach anyio's worker threads.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class CallCancelled(Exception):
    """The call was cancelled; raised inside the worker thread and never shown to users."""


@dataclass(frozen=True)
class CallContext:
    """One call's cancel flag and progress listener.

    Attributes:
        on_stage: called with a short stage name each time a stage of the flow begins.
        cancelled: set it to stop the call at its next check.
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


def current_call() -> CallContext | None:
    """The current call's context, for whoever acts for this call in another thread."""
    return _current.get()


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
    function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:  # fmt: skip
    """Run a blocking call in a worker thread; cancelling the awaiting task cancels the call.

    The call stops at its next check, so that the model's turn is free for the next caller.
    An ``on_stage`` listener of the surrounding context is kept.
    """
    outer = _current.get()
    context = CallContext(on_stage=outer.on_stage if outer else None)

    def call() -> T:
        with call_context(context):
            return function(*args, **kwargs)

    try:
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        context.cancelled.set()
        raise


def call_each(function: Callable[[S], T], items: Sequence[S], at_once: int) -> list[T]:
    """What ``function`` gives for each item: blocking calls side by side, all part of this call.

    Raises:
        Exception: the first error, in the order of the items; calls not begun are left out.
    """
    pool = ThreadPoolExecutor(at_once)
    try:
        calls = [pool.submit(contextvars.copy_context().run, function, item) for item in items]
        return [call.result() for call in calls]
    finally:
        pool.shutdown(cancel_futures=True)


class FairLock:
    """A lock that callers get first come, first served.

    A plain ``threading.Lock`` may let one busy thread take it again and again. A caller whose call
    was cancelled while it waited passes the lock on as soon as it gets it.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self._held = False

    @property
    def waiting(self) -> int:
        """Callers in the queue, the holder not counted."""
        return len(self._queue)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the lock within the ``with`` block.

        Raises:
            CallCancelled: the current call is no longer wanted.
        """
        self._acquire()
        try:
            check_cancelled()
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        with self._state:
            if not self._held:
                self._held = True
                return
            handed_over = threading.Event()
            self._queue.append(handed_over)
        try:
            handed_over.wait()
        except BaseException:  # KeyboardInterrupt: leave the queue, or pass on what was handed over
            with self._state:
                in_queue = handed_over in self._queue
                if in_queue:
                    self._queue.remove(handed_over)
            if not in_queue:
                self._release()
            raise

    def _release(self) -> None:
        with self._state:
            if self._queue:
                self._queue.popleft().set()  # stays held: by the next one
            else:
                self._held = False
