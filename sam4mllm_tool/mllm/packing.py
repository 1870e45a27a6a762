"""Several dialogues, about one picture or about several, in a single forward pass.

The pass reads one row of tokens: the new ones of all dialogues, picture by picture. All that a
model does to each token on its own reads its weights once for the whole row. Attention alone runs
picture by picture (:func:`by_picture`), over as many keys and values as without sharing: those of
the tokens that all dialogues about the picture have read in common, held once, then of those that
each has read beyond them, then of those that each reads now. Within a picture a mask keeps the
dialogues apart, and each dialogue has its own positions, so that every token attends to the same
tokens as if it were read alone.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sam4mllm_tool.mllm.prefix import Prefix, common_length

_BY_PICTURE = "sam4mllm_by_picture"


@dataclass(frozen=True, eq=False)
class Row:
    """One dialogue's read: ``ids`` after ``prefix``, with the logits of the last ``keep``.

    Attributes:
        picture: what the dialogue is about; dialogues about the same begin alike.
    """

    picture: Hashable
    prefix: Prefix
    ids: tuple[int, ...]
    keep: int


class Part(NamedTuple):  # a tuple, so that a model on several devices has its tensor moved along
    """One picture's part of a pass.

    Attributes:
        new: tokens that are read.
        held: tokens in the cache after the pass.
        mask: what is added to their attention, shape (1, 1, new, held); ``None`` adds nothing.
    """

    new: int
    held: int
    mask: Tensor | None


def by_picture(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    parts: Sequence[Part],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each picture's new tokens to what the cache holds of that picture.

    An attention function of transformers: tensors have shape (1, heads, tokens, head width), the
    result (1, tokens, heads, head width).
    """
    new, held = [part.new for part in parts], [part.held for part in parts]
    tensors = zip(query.split(new, 2), key.split(held, 2), value.split(held, 2), strict=True)
    found = [
        sdpa_attention_forward(module, *of_picture, part.mask, **kwargs)[0]
        for of_picture, part in zip(tensors, parts, strict=True)
    ]
    return torch.cat(found, 1), None


AttentionInterface.register(_BY_PICTURE, by_picture)


@contextmanager
def attention_by_picture(config: Any) -> Iterator[None]:
    """Let the language model of this config attend picture by picture, within the block."""
    usual = config._attn_implementation
    config._attn_implementation = _BY_PICTURE
    try:
        yield
    finally:
        config._attn_implementation = usual


class PackedLayer(DynamicLayer):
    """A layer of several dialogues' prefixes; owns the pass's own tokens.

    Tensors have shape (1, heads, tokens, head width).

    Args:
        parts: for each picture the keys and values that are held, in pieces, and how many tokens
            the pass reads.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], int]]) -> None:
        super().__init__()
        self._parts = parts
        self.lazy_initialization(*parts[0][0][0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the pass, and return all of them, picture by picture."""
        self.keys, self.values = key_states, value_states
        new = [count for _, count in self._parts]
        now = zip(key_states.split(new, -2), value_states.split(new, -2), strict=True)
        pieces = [
            piece
            for (held, _), of_pass in zip(self._parts, now, strict=True)
            for piece in (*held, of_pass)
        ]
        keys, values = zip(*pieces, strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def get_seq_length(self) -> int:
        """Tokens of all prefixes, and of the pass once it was run."""
        read = self.keys.shape[-2] if self.keys.ndim > 1 else 0
        return int(sum(keys.shape[-2] for held, _ in self._parts for keys, _ in held) + read)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows about one picture.

    Attributes:
        branches: of each row's prefix.
        shared: how many leading tokens all prefixes have in common.
    """

    rows: Sequence[Row]
    branches: Sequence[Cache]
    shared: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Group:
        """Group rows whose prefixes begin alike and can be cut."""
        shared = len(rows[0].prefix.ids)
        for row in rows[1:]:
            shared = min(shared, common_length(rows[0].prefix.ids, row.prefix.ids))
        return cls(rows, [row.prefix.branch() for row in rows], shared)

    @property
    def new(self) -> int:
        """Tokens that the pass reads."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def held(self) -> int:
        """Tokens that the cache holds after the pass."""
        old = sum(len(row.prefix.ids) - self.shared for row in self.rows)
        return self.shared + old + self.new

    def pieces(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """A layer's keys and values of all prefixes: what they have in common, then the rest."""
        pieces = self.branches[0].layers[layer].pieces(0, self.shared)
        for branch in self.branches:
            pieces += branch.layers[layer].pieces(self.shared)
        return list(pieces)

    def visible(self) -> Tensor:
        """Which token of the pass (row) sees which token that is held after it (column)."""
        each = torch.arange(len(self.rows))
        old = torch.tensor([len(row.prefix.ids) - self.shared for row in self.rows])
        reads = each.repeat_interleave(torch.tensor([len(row.ids) for row in self.rows]))
        owner = torch.cat([torch.full((self.shared,), -1), each.repeat_interleave(old), reads])
        place = torch.arange(len(owner))
        now = place[len(owner) - len(reads) :]
        own = (owner == reads[:, None]) | (owner == -1)
        return own & (place <= now[:, None])

    def part(self, device: torch.device, dtype: torch.dtype) -> Part:
        """What attention needs to know of it."""
        hidden = ~self.visible()
        if not hidden.any():
            return Part(self.new, self.held, None)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        return Part(self.new, self.held, mask[None, None].to(device))


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows in one pass.

    Attributes:
        groups: the rows by their pictures, in their order.
        cache: to pass to the model, which fills it.
    """

    groups: Sequence[Group]
    cache: Cache

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Pack:
        """Pack rows; those about one picture stand side by side, and their prefixes can be cut."""
        groups = [Group.of(list(some)) for _, some in groupby(rows, lambda row: row.picture)]
        cache = copy.copy(groups[0].branches[0])
        cache.layers = [
            PackedLayer([(group.pieces(layer), group.new) for group in groups])
            for layer in range(len(cache.layers))
        ]
        return cls(groups, cache)

    @property
    def rows(self) -> list[Row]:
        """All rows, in their order."""
        return [row for group in self.groups for row in group.rows]

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The model's arguments beside the cache; logits come in the order of the rows."""
        rows = self.rows
        positions = [
            torch.arange(len(row.ids)) + len(row.prefix.ids) + row.prefix.position_shift
            for row in rows
        ]
        ends = torch.tensor([len(row.ids) for row in rows]).cumsum(0).tolist()
        kept = [torch.arange(end - row.keep, end) for end, row in zip(ends, rows, strict=True)]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row.ids]]).to(device),
            "position_ids": torch.cat(positions)[None].to(device),
            # A mask in four dimensions: models leave it as it is and make none of their own.
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),
            "logits_to_keep": torch.cat(kept).to(device),
            "parts": [group.part(device, dtype) for group in self.groups],
        }

    def prefixes(self) -> list[Prefix]:
        """The tokens that each row has read after the pass, as separate prefixes."""
        found, start = [], 0
        branches = (branch for group in self.groups for branch in group.branches)
        for row, branch in zip(self.rows, branches, strict=True):
            here = slice(start, start := start + len(row.ids))
            for layer, packed in zip(branch.layers, self.cache.layers, strict=True):
                layer.append(packed.keys[..., here, :], packed.values[..., here, :])
            found.append(Prefix(row.prefix.ids + row.ids, branch, row.prefix.position_shift))
        return found
