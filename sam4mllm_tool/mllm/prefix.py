"""Prefilled prefixes as values: the tokens read so far, with their key-value cache.

A :class:`Prefix` is never changed. Reading on from it makes a new one whose layers share the
tensors of the old; so any number of dialogues branch off one image, in any order and from any
thread, and evicting a prefix does not affect a caller that still extends it.

Why layers of our own: transformers' caches are changed in place by every pass, so two dialogues
that share an image would need a copy of its keys and values each (hundreds of megabytes for a
large model), or would have to take turns and crop the cache back in between. The image's part of
the cache is by far the longest; a :class:`BranchLayer` refers to it and copies only the tail.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class BranchLayer(DynamicLayer):
    """A layer that shares the keys and values of a trunk and owns only those after it.

    Tensors have shape (1, heads, tokens, head width); ``keys`` and ``values`` hold the tail.
    transformers calls :meth:`update` with a pass's new keys and values, and attends to what that
    returns. Trunk and tail are joined for that one pass only; each pass pays for this copy, but
    the branch keeps no second trunk in memory.
    """

    def __init__(self, trunk_keys: Tensor, trunk_values: Tensor) -> None:
        super().__init__()
        self.trunk_keys, self.trunk_values = trunk_keys, trunk_values
        self.lazy_initialization(trunk_keys, trunk_values)
        self.keys, self.values = trunk_keys[..., :0, :], trunk_values[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to the tail and return trunk and tail as one."""
        self.append(key_states, value_states)
        return (
            torch.cat([self.trunk_keys, self.keys], dim=-2),
            torch.cat([self.trunk_values, self.values], dim=-2),
        )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append copies to the tail."""
        # `cat` makes new tensors: other branches that share the old tail do not see the change.
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)

    def pieces(self, start: int, end: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Views of the keys and values of the tokens from ``start`` to ``end``, in order."""
        trunk = self.trunk_keys.shape[-2]
        end = self.get_seq_length() if end is None else end
        old = slice(start, min(end, trunk))
        new = slice(max(0, start - trunk), max(0, end - trunk))
        found = [
            (self.trunk_keys[..., old, :], self.trunk_values[..., old, :]),
            (self.keys[..., new, :], self.values[..., new, :]),
        ]
        return [(keys, values) for keys, values in found if keys.shape[-2]]

    def get_seq_length(self) -> int:
        """Tokens in trunk and tail."""
        return int(self.trunk_keys.shape[-2] + self.keys.shape[-2])

    def cut(self, length: int) -> BranchLayer:
        """A view of the first ``length`` tokens."""
        other = copy.copy(self)
        trunk = self.trunk_keys.shape[-2]
        if length < trunk:
            other.trunk_keys = self.trunk_keys[..., :length, :]
            other.trunk_values = self.trunk_values[..., :length, :]
        tail = max(0, length - trunk)
        other.keys, other.values = self.keys[..., :tail, :], self.values[..., :tail, :]
        return other


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that the model has read, and their cache.

    Attributes:
        ids: the tokens.
        cache: their keys and values; treat as read-only, pass :meth:`branch` to the model.
        position_shift: difference between a later token's index and its rotary position (the
            image's grid takes fewer positions than tokens in Qwen-VL families).
    """

    ids: tuple[int, ...]
    cache: Cache
    position_shift: int = 0

    @property
    def can_be_cut(self) -> bool:
        """Whether every layer keeps keys and values of each token separately.

        Linear-attention layers hold a running sum, and sliding windows drop the oldest tokens:
        those cannot be shortened.
        """
        return all(type(layer) in (DynamicLayer, BranchLayer) for layer in self.cache.layers)

    def branch(self, length: int | None = None) -> Cache:
        """A cache to read on with, of all tokens or (if it can be cut) of the first ``length``."""
        other = copy.copy(self.cache)
        other.layers = [_branch_layer(layer) for layer in self.cache.layers]
        if length is not None and length < len(self.ids):
            other.layers = [layer.cut(length) for layer in other.layers]
        return other

    def cut(self, length: int) -> Prefix:
        """The prefix's first ``length`` tokens (a view)."""
        if length >= len(self.ids):
            return self
        return Prefix(self.ids[:length], self.branch(length), self.position_shift)

    def shared_length(self, ids: Sequence[int]) -> int:
        """How many leading tokens of ``ids`` need not be read again (0 if none)."""
        same = common_length(self.ids, ids)
        return same if same == len(self.ids) or self.can_be_cut else 0

    def own_bytes(self, trunk: Prefix | None = None) -> int:
        """Bytes of keys, values and states, those shared with ``trunk`` left out."""
        shared = set() if trunk is None else set(_storages(trunk.cache))
        return sum(n for key, n in _storages(self.cache).items() if key not in shared)


def _branch_layer(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return BranchLayer(layer.keys, layer.values)
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        # Linear-attention layers write into these tensors; all others replace theirs.
        if isinstance(value, dict):
            setattr(other, name, {k: _own(v) for k, v in value.items()})
        elif name in ("conv_states", "recurrent_states"):
            setattr(other, name, _own(value))
    return other


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two dialogues share."""
    first, second = tuple(first), tuple(second)
    same, most = 0, min(len(first), len(second))
    while same < most:  # bisected, as slices of thousands of tokens compare fast
        middle = (same + most + 1) // 2
        if first[same:middle] == second[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def _storages(cache: Cache) -> dict[int, int]:
    """Address and bytes of every tensor storage behind a cache."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors = value.values() if isinstance(value, dict) else (value,)
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found
