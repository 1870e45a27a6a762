"""Several dialogues about one picture in a single forward pass.

The row holds once the tokens that all of them have read in common, then those that each has read
beyond them, then those that each reads now. A mask keeps the dialogues apart, and each dialogue
has its own positions, so that every token attends to the same tokens as if it were read alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sam4mllm_tool.mllm.prefix import BranchLayer, Prefix, common_length


@dataclass(frozen=True, eq=False)
class Row:
    """One dialogue's read: ``ids`` after ``prefix``, with the logits of the last ``keep``."""

    prefix: Prefix
    ids: tuple[int, ...]
    keep: int


class PackedLayer(DynamicLayer):
    """A layer of several prefixes, their common part held once; owns the pass's own tokens.

    Tensors have shape (1, heads, tokens, head width).
    """

    def __init__(self, layers: Sequence[BranchLayer], shared: int) -> None:
        super().__init__()
        pieces = [*layers[0].pieces(0, shared)]
        for layer in layers:
            pieces += layer.pieces(shared)
        self._keys = [keys for keys, _ in pieces]
        self._values = [values for _, values in pieces]
        self.lazy_initialization(self._keys[0], self._values[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of the pass, and return all of them."""
        self.keys, self.values = key_states, value_states
        return torch.cat([*self._keys, self.keys], -2), torch.cat([*self._values, self.values], -2)

    def get_seq_length(self) -> int:
        """Tokens of all prefixes, and of the pass once it was run."""
        read = self.keys.shape[-2] if self.keys.ndim > 1 else 0
        return int(sum(keys.shape[-2] for keys in self._keys) + read)


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows in one pass.

    Attributes:
        cache: to pass to the model, which fills it.
        shared: how many leading tokens all prefixes have in common.
    """

    rows: Sequence[Row]
    branches: Sequence[Cache]
    cache: Cache
    shared: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Pack:
        """Pack rows whose prefixes begin alike and can be cut."""
        shared = len(rows[0].prefix.ids)
        for row in rows[1:]:
            shared = min(shared, common_length(rows[0].prefix.ids, row.prefix.ids))
        branches = [row.prefix.branch() for row in rows]
        cache = copy.copy(branches[0])
        layers = zip(*(branch.layers for branch in branches), strict=True)
        cache.layers = [PackedLayer(same, shared) for same in layers]
        return cls(rows, branches, cache, shared)

    @property
    def length(self) -> int:
        """Tokens that the cache holds after the pass."""
        beyond = sum(len(row.prefix.ids) - self.shared + len(row.ids) for row in self.rows)
        return self.shared + beyond

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's arguments beside the cache; logits come in the order of the rows."""
        ids = [token for row in self.rows for token in row.ids]
        positions = [
            torch.arange(len(row.ids)) + len(row.prefix.ids) + row.prefix.position_shift
            for row in self.rows
        ]
        ends = torch.tensor([len(row.ids) for row in self.rows]).cumsum(0).tolist()
        kept = [torch.arange(e - row.keep, e) for e, row in zip(ends, self.rows, strict=True)]
        hidden = ~self.visible()
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        arguments = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.cat(positions)[None],
            "attention_mask": mask[None, None],
            "logits_to_keep": torch.cat(kept),
        }
        return {name: value.to(device) for name, value in arguments.items()}

    def visible(self) -> Tensor:
        """Which token of the pass (row) sees which token of the cache (column)."""
        each = torch.arange(len(self.rows))
        old = torch.tensor([len(row.prefix.ids) - self.shared for row in self.rows])
        new = torch.tensor([len(row.ids) for row in self.rows])
        reads = each.repeat_interleave(new)
        owner = torch.cat([torch.full((self.shared,), -1), each.repeat_interleave(old), reads])
        place = torch.arange(len(owner))
        now = place[len(owner) - len(reads) :]
        own = (owner == reads[:, None]) | (owner == -1)
        return own & (place <= now[:, None])

    def prefixes(self) -> list[Prefix]:
        """The tokens that each row has read after the pass, as separate prefixes."""
        found, start = [], 0
        for row, branch in zip(self.rows, self.branches, strict=True):
            here = slice(start, start := start + len(row.ids))
            for layer, packed in zip(branch.layers, self.cache.layers, strict=True):
                layer.append(packed.keys[..., here, :], packed.values[..., here, :])
            ids = row.prefix.ids + row.ids
            found.append(Prefix(ids, branch, row.prefix.position_shift))
        return found
