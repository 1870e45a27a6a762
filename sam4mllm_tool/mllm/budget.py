"""A bound on what several callers hold on one device at a time."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
        self._held: list[_Share] = []

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return _total(self._held)

    @contextmanager
    def held(self, nbytes: int, shared: Mapping[Hashable, int] | None = None) -> Iterator[None]:
        """Hold that many bytes within the ``with`` block.

        Args:
            nbytes: what this caller holds for itself.
            shared: what it holds together with all who name the same key; counts once.

        Raises:
            CallCancelled: the current call is no longer wanted.
        """
        share = _Share(nbytes, shared or {})
        with self._order.taken(), self._changed:
            while self._held and _total([*self._held, share]) > self.max_bytes:
                self._changed.wait(_POLL_SECONDS)
                check_cancelled()
            self._held.append(share)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(share)
                self._changed.notify_all()


@dataclass(frozen=True, eq=False)
class _Share:
    """What one caller holds."""

    own: int
    shared: Mapping[Hashable, int]


def _total(held: Sequence[_Share]) -> int:
    together: dict[Hashable, int] = {}
    for share in held:
        together.update(share.shared)
    return sum(share.own for share in held) + sum(together.values())
