"""Attention circuits written into the decoder's first three layers before training.

The rows of a head's query and key weights form rotary pairs: the scores of fast pairs depend on the
distance of two tokens, slow pairs compare contents at any distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recipes.embedded_mllm.layout import WORD_WIDTH, Layout, Meanings
from recipes.embedded_mllm.vision import CELLS, CODE

TYPICAL = (5.66, 5.3, 4.5)  # approximate values of a flag after the norms of the first three layers


class Heads:
    """Writes circuits into the heads of one attention layer; :meth:`clear` a head first."""

    def __init__(self, attention: Any, theta: float, typical: float) -> None:
        self.q, self.k = attention.q_proj.weight, attention.k_proj.weight
        self.v, self.o = attention.v_proj.weight, attention.o_proj.weight
        self.width = attention.head_dim
        self.half = self.width // 2
        self.typical = typical
        self.rates = theta ** (-torch.arange(self.half) / self.half)
        self._used: dict[int, int] = {}

    def clear(self, head: int) -> None:
        """Reset a head to small noise, from which training can start."""
        rows = slice(head * self.width, (head + 1) * self.width)
        for weight in (self.q[rows], self.k[rows]):
            weight.normal_(0, 0.003)
        for weight in (self.v[rows], self.o[:, rows]):
            weight.normal_(0, 0.01)
        self._used[head] = 0

    def turn(
        self, head: int, query: int, key: int, pair: int, distance: float, score: float
    ) -> None:
        """Add ``score * cos(rate * (d - distance))`` to the attention score.

        ``d`` is the number of tokens from key to query. The query and key channels are flags;
        ``pair`` selects the rate.
        """
        row, scale = head * self.width + pair, self._scale(score)
        angle = distance * float(self.rates[pair])
        self.q[row, query] += scale * math.cos(angle) * math.copysign(1, score)
        self.q[row + self.half, query] -= scale * math.sin(angle) * math.copysign(1, score)
        self.k[row, key] += scale

    def link(self, head: int, query: int, key: int, pair: int, score: float) -> None:
        """Add ``score`` where both flags are set, at any distance (``pair`` must be slow)."""
        self.turn(head, query, key, pair, 0.0, score)

    def prefer(self, head: int, channels: slice, pair: int, weight: float) -> None:
        """Make the score of :meth:`link` on this pair also depend on these key channels."""
        self.k[head * self.width + pair, channels] += weight

    def match(self, head: int, rows: list[int], query: Tensor, key: Tensor) -> None:
        """Add the product of two linear read-outs, (rows, width) each, to the attention score."""
        index = torch.tensor(rows) + head * self.width
        self.q[index] += query
        self.k[index] += key

    def slow_rows(self, first_pair: int, count: int) -> list[int]:
        """Rows of ``count`` pairs from ``first_pair`` on: first halves, then second halves."""
        pairs = list(range(first_pair, first_pair + count))
        return pairs + [pair + self.half for pair in pairs]

    def move(self, head: int, source: slice | int, target: slice | int, gain: float) -> None:
        """Copy channels from the attended token to the attending token."""
        sources = [source] if isinstance(source, int) else list(range(source.start, source.stop))
        targets = [target] if isinstance(target, int) else list(range(target.start, target.stop))
        for one, other in zip(sources, targets, strict=True):
            row = head * self.width + self._used[head]
            self._used[head] += 1
            self.v[row] = 0
            self.v[row, one] = 1
            self.o[:, row] = 0
            self.o[other, row] = gain

    def average(self, head: int, sources: dict[int, float], target: int, gain: float) -> None:
        """Copy a weighted sum of channels into one channel."""
        self.move(head, target, target, gain)
        row = head * self.width + self._used[head] - 1
        self.v[row, target] = 0
        for source, weight in sources.items():
            self.v[row, source] = weight

    def _scale(self, score: float) -> float:
        return math.sqrt(abs(score) * math.sqrt(self.width)) / self.typical


def write_reading(heads: Heads) -> None:
    """Layer 1: a ``y`` copies its ``x``; points and answers get an index, box edges a flag."""
    flag = Layout.flag
    text = flag("text")
    for head in range(8):
        heads.clear(head)
    for head, distance in ((0, 2), (1, 3), (6, 4), (7, 6)):
        for pair in range(4):
            heads.turn(head, text, text, pair, distance, 14.0)
    heads.move(0, Layout.number, Layout.place_x, 0.55)
    heads.move(0, flag("open"), flag("open2"), 0.75)
    heads.move(1, flag("paren"), flag("point"), 0.6)
    heads.move(6, flag("open"), flag("open4"), 0.75)
    heads.move(7, flag("open"), flag("open6"), 0.75)
    for head, (pair, quarter_turn) in zip(
        range(2, 6), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True
    ):
        back = quarter_turn * math.pi / 2
        # Answers: i tokens after the newline. Points: 4 + 5 i tokens after the colon.
        heads.turn(
            head, flag("answer"), flag("newline"), pair, back / heads.rates[pair].item(), 2.5
        )
        shift = 4 + back / heads.rates[pair + 1].item()
        heads.turn(head, flag("number"), flag("anchor"), pair + 1, shift, 2.5)
        for query, key, slow in (("answer", "newline", 8), ("number", "anchor", 9)):
            heads.link(head, flag(query), flag(key), slow, 14.0)
            heads.link(head, flag(query), flag("start"), slow, 14.0)
        # If there are several newlines, the nearest one counts.
        for pair_of_decay, score in ((2, 6.0), (3, 10.0)):
            heads.turn(head, flag("answer"), flag("newline"), pair_of_decay, 0, score)
        heads.link(head, flag("answer"), flag("start"), 10, 16.0)
        count = flag(f"count{head - 2}")
        heads.move(head, flag("newline"), count, 0.5)
        heads.move(head, flag("anchor"), count, 0.5)
        heads.move(head, flag("start"), count, -0.5)


def write_looking(heads: Heads, vision: Any) -> None:
    """Layer 2: four heads attend to the quarters of the patch at a point; two collect words."""
    flag = Layout.flag
    grid = vision.image_size // vision.patch_size
    width = heads.q.shape[1]
    chosen = torch.arange(2, 7)  # frequencies: the slowest carry little, the fastest alias
    half = CODE // 2
    picks = torch.cat([chosen, chosen + half])
    for head in range(4):
        heads.clear(head)
        query, key = torch.zeros(20, width), torch.zeros(20, width)
        offsets = ((head % 2 - 0.5) / 2 / grid, (head // 2 - 0.5) / 2 / grid)
        for axis, (start, offset) in enumerate(
            zip((Layout.place_x.start, Layout.place_y.start), offsets, strict=True)
        ):
            turn = shift_code(offset)
            # Sine and cosine of one frequency share a rotating pair: 5 pairs per axis.
            here = torch.arange(axis * 5, axis * 5 + 5)
            here = torch.cat([here, here + 10])
            query[here, start + picks] = 1.9
            key[here, start : start + CODE] = 1.9 * turn[picks]
        heads.match(head, heads.slow_rows(5, 10), query, key)
        heads.link(head, flag("point"), flag("image"), 15, 20.0)
        heads.link(head, flag("text"), flag("start"), 4, 20.0)
        heads.average(head, _cells_of_quarter(head), Layout.quarter.start + head, 0.6)
        part = (Layout.word if head < 2 else Layout.box).start + 31 * (head % 2)
        heads.move(head, slice(part, part + 31), slice(part, part + 31), 0.6)
    for head in (6, 7):
        heads.clear(head)
    for head in (4, 5):
        heads.clear(head)
        heads.link(head, flag("slot"), flag("word"), 6, 12.0)
        heads.link(head, flag("text"), flag("start"), 7, 2.0)
        part = Layout.word.start + 31 * (head - 4)
        heads.move(head, slice(part, part + 31), slice(part, part + 31), 0.6)


def _cells_of_quarter(quarter: int) -> dict[int, float]:
    """Channels of the cells in a quarter of a patch, with the fraction of it that each fills."""
    across, down = quarter % 2, quarter // 2
    shares = ((2 / 3, 1 / 3, 0.0), (0.0, 1 / 3, 2 / 3))
    return {
        Layout.cells.start + row * CELLS + column: shares[down][row] * shares[across][column]
        for row in range(CELLS)
        for column in range(CELLS)
    }


def shift_code(offset: float) -> Tensor:
    """Matrix that turns the code of v into the code of v + offset: (CODE, CODE)."""
    rates = 0.25 * 32 ** (torch.arange(CODE // 2) / (CODE // 2 - 1))
    cosine, sine = (
        torch.diag((2 * math.pi * offset * rates).cos()),
        torch.diag((2 * math.pi * offset * rates).sin()),
    )
    return torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)], 0)


def write_finding(heads: Heads, meanings: Meanings) -> None:
    """Layer 3: an answer attends to its point, a box's number to patches that match the words."""
    flag = Layout.flag
    width = heads.q.shape[1]
    counts = [flag(f"count{n}") for n in range(4)]
    for head in range(4):
        heads.clear(head)
        query = torch.zeros(4, width)
        query[torch.arange(4), counts] = 1.0
        heads.match(head, [5, 6, 7, 8], query * 2.6, query * 2.6)
        heads.link(head, flag("answer"), flag("point"), 9, 24.0)
        heads.link(head, flag("text"), flag("start"), 10, 14.0)
        heads.move(head, Layout.quarter.start + head, Layout.quarter.start + head, 1.0)
        begin = (Layout.word if head < 2 else Layout.box).start + 31 * (head % 2)
        end = (Layout.seen_word if head < 2 else Layout.seen_box).start + 31 * (head % 2)
        heads.move(head, slice(begin, begin + 31), slice(end, end + 31), 1.0)
    for edge, (head, slot) in enumerate(
        zip(range(4, 8), ("open", "open2", "open4", "open6"), strict=True)
    ):
        heads.clear(head)
        mix = torch.linalg.qr(torch.randn(len(meanings.concepts), 22))[0].T
        read = torch.zeros(22, width)
        read[:, Layout.word] = mix @ (meanings.directions / math.sqrt(WORD_WIDTH))
        heads.match(head, heads.slow_rows(5, 11), read * 1.4, read * 1.4)
        heads.link(head, flag(slot), flag("image"), 4, 12.0)
        heads.prefer(head, Layout.cells, 4, 0.2)  # well covered patches have the best boxes
        heads.prefer(head, slice(flag("text"), flag("text") + 1), 4, -5.5)  # not text tokens
        heads.link(head, flag("text"), flag("start"), 3, 10.0)
        heads.move(head, Layout.edge(edge), Layout.number, 2.0)
        if edge == 0:
            heads.link(head, flag("newline"), flag("image"), 4, 15.0)
            heads.move(head, flag("image"), flag("found"), 1.0)
