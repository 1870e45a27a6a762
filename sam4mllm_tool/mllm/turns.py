"""Which caller reads next: callers take turns, first come first served, and share passes.

The caller whose turn it is runs a pass for itself and for all callers that wait with reads that can
share it. The scheduler has no thread of its own, so a pass that fails ends only the call that ran
it, and the others ask again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Generic, TypeVar

from sam4mllm_tool.concurrency import CallContext, check_cancelled, current_call

R = TypeVar("R")
T = TypeVar("T")


@dataclass(eq=False)
class _Caller(Generic[R, T]):
    """A waiting caller and its reads: a place in the queue.

    Attributes:
        outcomes: of the reads that were run, by their index.
        woken: notified when it is this caller's turn, or all its reads were run.
    """

    reads: Sequence[R]
    woken: threading.Condition
    call: CallContext | None = field(default_factory=current_call)
    outcomes: dict[int, T | Exception] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        """Whether the call was not cancelled."""
        return self.call is None or not self.call.cancelled.is_set()

    @property
    def waiting(self) -> list[int]:
        """Indices of the reads that were not run."""
        return [i for i in range(len(self.reads)) if i not in self.outcomes]

    @property
    def served(self) -> bool:
        """Whether all reads were run."""
        return len(self.outcomes) == len(self.reads)


class Turns(Generic[R, T]):
    """Runs the callers' reads, together where they can share a pass.

    Fair: the caller that has waited longest gets the turn and then goes to the end of the queue;
    within a shared turn, the first reads of all callers come before any second read.

    Args:
        run: runs the first of the given reads, and as many of the others as fit into the pass: one
            outcome per read, ``None`` for those that must wait for another turn. An error of one
            read is its outcome; an error raised belongs to the caller whose turn it is.
        shares: whether a read can share a pass; if not, it is run alone.
    """

    def __init__(
        self,
        run: Callable[[Sequence[R]], Sequence[T | Exception | None]],
        shares: Callable[[R], bool],
    ) -> None:
        self._run, self._shares = run, shares
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._queue: deque[_Caller[R, T]] = deque()
        self._busy = False
        self._under_way = 0
        self._last_seconds = 0.0

    def take(self, reads: Sequence[R]) -> list[T]:
        """The outcomes of one or more reads, once their turns have come.

        Raises:
            CallCancelled: the current call is no longer wanted.
            Exception: the first error among the outcomes.
        """
        check_cancelled()
        caller: _Caller[R, T] = _Caller(reads, threading.Condition(self._lock))
        with self._lock:
            self._queue.append(caller)
            self._arrived.notify_all()
        try:
            while self._waited(caller):
                self._lead(caller)
        finally:
            with self._lock:
                if caller in self._queue:
                    self._queue.remove(caller)
                self._call_next()
        outcomes = [caller.outcomes[index] for index in range(len(reads))]
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes  # type: ignore[return-value]

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Announce a caller, so that others wait for its next read for a moment.

        Without it, callers that share a turn would fall out of step: the first to return from a
        pass would run the next one alone.
        """
        with self._lock:
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._arrived.notify_all()

    def _waited(self, caller: _Caller[R, T]) -> bool:
        """Wait for the turn, which is true, or until others have run all of it."""
        with self._lock:
            while not caller.served:
                if not self._busy and self._queue[0] is caller:
                    self._busy = True
                    return True
                caller.woken.wait()
        return False

    def _lead(self, caller: _Caller[R, T]) -> None:
        """Run one pass, for this caller and for others."""
        try:
            check_cancelled()
            with self._lock:
                chosen = self._gathered(caller)
            start = time.monotonic()
            outcomes = self._run([who.reads[index] for who, index in chosen])
            self._last_seconds = time.monotonic() - start
            with self._lock:
                for (who, index), outcome in zip(chosen, outcomes, strict=True):
                    if outcome is not None:
                        who.outcomes[index] = outcome
                self._dismiss()
        finally:
            with self._lock:
                self._busy = False
                if self._queue and self._queue[0] is caller:
                    self._queue.rotate(-1)
                self._call_next()

    def _gathered(self, leader: _Caller[R, T]) -> list[tuple[_Caller[R, T], int]]:
        """The leader's first read and the waiting reads that can share its pass, in turn."""
        first = leader.waiting[0]
        if not self._shares(leader.reads[first]):
            return [(leader, first)]
        self._await_others()
        wanted = [who for who in self._queue if who is leader or who.wanted]
        ranks = zip_longest(
            *([(who, i) for i in who.waiting if self._shares(who.reads[i])] for who in wanted)
        )
        return [one for rank in ranks for one in rank if one is not None]

    def _await_others(self) -> None:
        """Wait for announced callers, for at most half the time of the last pass."""
        end = time.monotonic() + self._last_seconds / 2
        while (left := end - time.monotonic()) > 0 and len(self._queue) < self._under_way:
            self._arrived.wait(left)

    def _dismiss(self) -> None:
        """Wake the callers whose reads were all run."""
        for who in [who for who in self._queue if who.served]:
            self._queue.remove(who)
            who.woken.notify()

    def _call_next(self) -> None:
        if self._queue and not self._busy:
            self._queue[0].woken.notify()
