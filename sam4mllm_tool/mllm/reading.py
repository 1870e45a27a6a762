"""What dialogues want to have read, as values: places in a dialogue, reads, and decodings.

A decoding is a generator. It never calls the model: it yields what it wants to have read and goes
on with what came of it, so that many of them, in one call or in several, can share a pass.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from sam4mllm_tool.mllm.encoding import ImageInputs
from sam4mllm_tool.mllm.prefix import Prefix
from sam4mllm_tool.mllm.store import ImageKey

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Spot:
    """A place in a dialogue from which the model can read on; a value, like its prefix.

    Attributes:
        key: image and header that the dialogue begins with.
        inputs: the image's model inputs, if they are needed after all.
        prefix: what was read, ``None`` before the image was.
        unread: ids that come before anything else is read.
        passes: model calls spent to get here.
    """

    key: ImageKey
    inputs: ImageInputs = field(repr=False)
    prefix: Prefix | None
    unread: tuple[int, ...]
    passes: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids up to here."""
        return (() if self.prefix is None else self.prefix.ids) + self.unread

    def cut(self, length: int) -> Spot:
        """The place after the first ``length`` ids, all of them read."""
        assert self.prefix is not None and not self.unread
        return replace(self, prefix=self.prefix.cut(length))


@dataclass(frozen=True, eq=False)
class Read:
    """What a dialogue wants to have read: what is unread at ``spot``, then ``ids``.

    Attributes:
        keep: of how many of the last ids the logits are wanted.
    """

    spot: Spot
    ids: tuple[int, ...] = ()
    keep: int = 1

    @property
    def unread(self) -> tuple[int, ...]:
        """All ids to read."""
        return self.spot.unread + self.ids


Readout = tuple[Spot, Tensor]
"""The new place, and float32 logits of shape (keep, vocabulary) behind the last ids read."""

Decoding = Generator[Sequence[Read], Sequence[Readout], T]
"""Yields what it wants to have read, is sent what came of it, and returns what it has found."""


def read(spot: Spot, ids: Sequence[int] = (), keep: int = 1) -> Decoding[Readout]:
    """Read on in one dialogue."""
    (readout,) = yield [Read(spot, tuple(ids), keep)]
    return readout


def together(decodings: Sequence[Decoding[T]]) -> Decoding[list[T]]:
    """Several decodings in step: what they want to have read is asked for at the same time."""
    found: dict[int, T] = {}
    sent: dict[int, Sequence[Readout] | None] = dict.fromkeys(range(len(decodings)))
    while sent:
        wanted: dict[int, Sequence[Read]] = {}
        for index, readouts in sent.items():
            try:
                wanted[index] = decodings[index].send(readouts)  # type: ignore[arg-type]
            except StopIteration as end:
                found[index] = end.value
        if wanted:
            rest = iter((yield [one for reads in wanted.values() for one in reads]))
            sent = {index: [next(rest) for _ in reads] for index, reads in wanted.items()}
        else:
            sent = {}
    return [found[index] for index in range(len(decodings))]
