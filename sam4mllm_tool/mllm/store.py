"""Cached prefixes: one entry per image, bounded by bytes, least recently used evicted first."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from cachetools import LRUCache

from sam4mllm_tool.mllm.prefix import Prefix

_BRANCHES_PER_IMAGE = 8

ImageKey = tuple[str, tuple[int, ...]]
"""Digest of an image, and the ids up to its last token (system prompt and header included)."""


@dataclass(frozen=True)
class _Entry:
    """An image's prefilled trunk and the dialogues that branch off it, oldest first."""

    trunk: Prefix
    branches: tuple[Prefix, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held; tensors shared between trunk and branches count once."""
        return self.trunk.own_bytes() + sum(b.own_bytes(self.trunk) for b in self.branches)


class PrefixStore:
    """Finds the longest kept prefix of a dialogue. Safe from many threads.

    Args:
        max_bytes: bound for all kept keys and values; what does not fit is simply not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._entries: LRUCache[ImageKey, _Entry] = LRUCache(max_bytes, lambda e: e.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return int(self._entries.currsize)

    def holds(self, key: ImageKey) -> bool:
        """Whether something is kept of this image."""
        with self._lock:
            return key in self._entries

    def find(self, key: ImageKey, ids: tuple[int, ...], unread: int = 1) -> Prefix | None:
        """The longest kept prefix of ``ids`` that leaves at least ``unread`` tokens to read.

        Logits come only from tokens that are read: a caller that wants the logits of the last n
        tokens must leave n of them unread, even if another caller has read the same dialogue.
        """
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            return None
        ids = ids[: len(ids) - unread]
        shared = ((known, known.shared_length(ids)) for known in (entry.trunk, *entry.branches))
        best, length = max(shared, key=lambda found: found[1])
        return best.cut(length) if length else None

    def keep(self, key: ImageKey, trunk: Prefix, branch: Prefix | None = None) -> None:
        """Keep an image's trunk, and a dialogue that continues it."""
        with self._lock:
            entry = self._entries.get(key) or _Entry(trunk)
            if branch is not None:
                entry = _Entry(entry.trunk, _with_branch(entry.branches, branch))
            for smaller in (entry, _Entry(entry.trunk)):
                if smaller.nbytes <= self._entries.maxsize:
                    self._entries[key] = smaller
                    return

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


def _with_branch(branches: tuple[Prefix, ...], new: Prefix) -> tuple[Prefix, ...]:
    """Add a branch; its prefixes need no entry of their own if it can be truncated to them."""
    others = tuple(
        b for b in branches if b.ids != new.ids
        and not (new.can_be_cut and b.ids == new.ids[: len(b.ids)])
    )  # fmt: skip
    return (*others, new)[-_BRANCHES_PER_IMAGE:]
