"""Admission of calls to the server: limits, fair queues, deadlines."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio

from sam4mllm_tool.errors import Busy, CallTimeout


@dataclass(frozen=True)
class Limits:
    """What a server grants its clients.

    Attributes:
        clients: clients with a workspace at a time; further ones are refused as busy.
        memory_bytes: pixels, masks and logits kept for all clients together.
        client_bytes: the same for one client.
        model_calls: calls that use the models at a time.
        waiting_calls: calls that wait for the models, and as many for the other places; further
            ones are refused as busy.
        other_calls: calls that need no model, pictures opened and masks read, at a time; half of
            them for one client at most, so that its slow downloads leave room for the others.
        call_seconds: deadline of a call: waiting, fetching, decoding and models together.
        idle_seconds: how long a client's handles outlive its last call.
        drain_seconds: how long running calls may take after SIGTERM.
    """

    clients: int = 1000
    memory_bytes: int = 4 * 1024**3
    client_bytes: int = 1024**3
    model_calls: int = 2
    waiting_calls: int = 256
    other_calls: int = 8
    call_seconds: float = 120.0
    idle_seconds: float = 1800.0
    drain_seconds: float = 30.0


class FairQueue:
    """Places for work. Clients take turns, however many calls each has waiting.

    Args:
        places: calls that run at a time.
        max_waiting: calls that may wait.
        each: places that one client may hold at a time; all by default.
    """

    def __init__(self, places: int, max_waiting: int, each: int | None = None) -> None:
        self._places = places
        self._free = places
        self._max_waiting = max_waiting
        self._each = places if each is None else each
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[anyio.Event]] = OrderedDict()
        self._mean_seconds = 1.0

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def seconds_until_free(self) -> float:
        """How long a call that came now would wait, judged by the calls before."""
        return max(1.0, self._mean_seconds * (self.waiting + 1) / self._places)

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Hold a place within the ``async with`` block.

        Raises:
            Busy: too many calls wait already.
        """
        await self._enter(client)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += 0.1 * (time.monotonic() - begun - self._mean_seconds)
            self._leave(client)

    async def _enter(self, client: str) -> None:
        if self._may_enter(client):
            self._take(client)
            return
        if self.waiting >= self._max_waiting:
            raise Busy(f"{self.waiting} calls wait", retry_after=self.seconds_until_free)
        turn = anyio.Event()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # the place was handed over just now
                self._leave(client)
            else:
                self._waiting[client].remove(turn)
                if not self._waiting[client]:
                    del self._waiting[client]
            raise

    def _leave(self, client: str) -> None:
        self._free += 1
        self._held[client] -= 1
        self._held += Counter()  # drops clients that hold none
        following = next(filter(self._may_enter, self._waiting), None)
        if following is None:
            return
        turns = self._waiting.pop(following)
        self._take(following)
        turns.popleft().set()
        if turns:
            self._waiting[following] = turns  # behind all others

    def _may_enter(self, client: str) -> bool:
        return self._free > 0 and self._held[client] < self._each

    def _take(self, client: str) -> None:
        self._free -= 1
        self._held[client] += 1


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Cancel what the ``with`` block does after so many seconds.

    Raises:
        CallTimeout: it was cancelled.
    """
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise CallTimeout(
            f"The call took longer than {seconds:g} s.",
            hint="Try again later, or ask for less: a smaller picture, fewer points.",
        )
