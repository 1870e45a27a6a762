"""Admission of calls to the server: limits, a fair queue for the models, memory per client."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
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
        waiting_calls: calls that wait for the models; further ones are refused as busy.
        other_calls: calls that need no model, and pictures opened, at a time.
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


class ModelQueue:
    """Places at the models. Clients take turns, however many calls each has waiting.

    Args:
        places: calls that run at a time.
        max_waiting: calls that may wait.
    """

    def __init__(self, places: int, max_waiting: int) -> None:
        self._places = places
        self._free = places
        self._max_waiting = max_waiting
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
            self._leave()

    async def _enter(self, client: str) -> None:
        if self._free:
            self._free -= 1
            return
        if self.waiting >= self._max_waiting:
            raise Busy(
                f"{self.waiting} calls wait for the models", retry_after=self.seconds_until_free
            )
        turn = anyio.Event()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # the place was handed over just now
                self._leave()
            else:
                self._waiting[client].remove(turn)
                if not self._waiting[client]:
                    del self._waiting[client]
            raise

    def _leave(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        client, turns = self._waiting.popitem(last=False)
        turns.popleft().set()
        if turns:
            self._waiting[client] = turns  # behind all others


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
