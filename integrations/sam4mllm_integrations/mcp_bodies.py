"""Bounds on the bodies of requests: the bytes of all together, and each one's time and content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from starlette.types import Message, Receive

_MOST_VALUES = 100_000
"""Bound on what a request's JSON holds: parsed, a value takes 20 times its characters.

Commas and brackets are counted; a picture's base64 has neither.
"""


class BodyRefused(Exception):
    """A body is over a bound.

    Attributes:
        status: of the answer.
        text: of the answer.
        headers: of the answer.
    """

    def __init__(self, status: int, text: str, headers: Mapping[str, str]) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


class ClientGone(Exception):
    """The connection was closed before the request was complete: there is nobody to answer."""


@dataclass
class Bodies:
    """The bodies of all requests that are not answered yet.

    Attributes:
        most_bytes: bound on all of them together.
        seconds: how long one may take to arrive.
        held: their bytes, those that are announced included.
    """

    most_bytes: int
    seconds: float
    held: int = 0

    @contextmanager
    def one(self, receive: Receive, announced: int) -> Iterator[Receive]:
        """``receive`` within the bounds; what arrives is counted until the end of the block.

        Args:
            receive: of the request.
            announced: bytes by the request's header, 0 if it does not say.

        Raises:
            BodyRefused: there is no room for as much as is announced. The inner ``receive`` raises
                it too, and ``ClientGone``.
        """
        taken = arrived = values = 0
        complete = False
        end = anyio.current_time() + self.seconds

        def take(size: int) -> None:
            nonlocal taken
            if self.held + size > self.most_bytes:
                raise BodyRefused(503, "Too many large requests.", {"Retry-After": "5"})
            taken += size
            self.held += size

        async def receive_in_bounds() -> Message:
            nonlocal arrived, values, complete
            if complete:
                return await receive()
            with anyio.CancelScope(deadline=end) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise BodyRefused(408, "The body came too slowly.", {"Connection": "close"})
            if message["type"] == "http.disconnect":
                raise ClientGone
            body = message.get("body", b"")
            complete = not message.get("more_body", False)
            arrived += len(body)
            take(max(0, arrived - taken))
            values += sum(map(body.count, (b",", b"[", b"{")))
            if values > _MOST_VALUES:
                raise BodyRefused(413, "Too many values.", {"Connection": "close"})
            return message

        try:
            take(announced)
            yield receive_in_bounds
        finally:
            self.held -= taken
