"""Files of JSON lines that survive being killed in the middle of a write.

Each entry is one line, on disk before :meth:`Journal.add` returns. A last line that was cut off
is dropped when the file is opened again, so no entry is lost or read in half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def read_journal(file: Path) -> list[Any]:
    """The whole lines of a journal, nothing if it does not exist."""
    return [json.loads(line) for line in _whole_lines(file).decode("utf-8").splitlines()]


class Journal:
    """An open journal; see :func:`open_journal`."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def add(self, entry: Any) -> None:
        """Write one JSON-ready entry, and wait until it is on disk."""
        self._lines.write(json.dumps(entry) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())


@contextmanager
def open_journal(file: Path) -> Iterator[Journal]:
    """A journal to add to, behind its last whole line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        os.truncate(file, len(_whole_lines(file)))
    with file.open("a", encoding="utf-8") as lines:
        yield Journal(lines)


def _whole_lines(file: Path) -> bytes:
    data = file.read_bytes() if file.exists() else b""
    return data[: data.rfind(b"\n") + 1]
