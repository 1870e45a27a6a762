"""Turns at the model: first come, first served, and a caller who has gone gives up the place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from sam4mllm_tool.calls import check_cancelled

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
