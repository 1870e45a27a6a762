"""Places in a dialogue, reads and decodings, as values.

A decoding is a generator. It never calls the model: it yields the reads that it needs and is sent
their results, so that many decodings, in one call or in several, can share a pass.
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
    """A request to read the unread ids of ``spot``, then ``ids``.

    Attributes:
        keep: the number of last ids whose logits are wanted.
    """

    spot: Spot
    ids: tuple[int, ...] = ()
    keep: int = 1

    @property
    def unread(self) -> tuple[int, ...]:
        """All ids to read."""
        return self.spot.unread + self.ids


Readout = tuple[Spot, Tensor]
"""The new place, and float32 logits of shape (keep, vocabulary) after the last ids read."""

Decoding = Generator[Sequence[Read], Sequence[Readout], T]
"""Yields the reads that it needs, is sent their results, and returns what it has decoded."""


def read(spot: Spot, ids: Sequence[int] = (), keep: int = 1) -> Decoding[Readout]:
    """Read on in one dialogue."""
    (readout,) = yield [Read(spot, tuple(ids), keep)]
    return readout


def together(decodings: Sequence[Decoding[T]]) -> Decoding[list[T]]:
    """Several decodings in step: their next reads are requested at the same time."""
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
