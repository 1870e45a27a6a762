"""A bound on what several callers hold on one device at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sam4mllm_tool.concurrency import FairLock, check_cancelled

_POLL_SECONDS = 0.1


class ByteBudget:
    """Lets callers in, first come first served, while what they hold together is within a bound.

    A caller that comes when nobody holds anything is let in whatever it needs: a bound smaller than
    one dialogue slows callers down, but does not block them.

    Args:
        max_bytes: bound on the sum of what all callers hold.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._order = FairLock()
        self._changed = threading.Condition()
        self._held: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(self._held)

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """Hold that many bytes within the ``with`` block.

        Raises:
            CallCancelled: the current call is no longer wanted.
        """
        with self._order.taken(), self._changed:
            while self._held and self.nbytes + nbytes > self.max_bytes:
                self._changed.wait(_POLL_SECONDS)
                check_cancelled()
            self._held.append(nbytes)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(nbytes)
                self._changed.notify_all()
