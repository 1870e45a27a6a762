"""Files of JSON lines that survive a kill or a full disk in the middle of a write.

Each entry is one line, on disk before :meth:`Journal.add` returns. A last line that was cut off
is dropped when the file is opened again, so no entry is lost or read in half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam4mllm_tool.disk import storing
from sam4mllm_tool.errors import InputError, StorageError


def read_journal(file: Path) -> list[Any]:
    """The whole lines of a journal, nothing if it does not exist.

    Raises:
        InputError: a line before the last is not JSON.
    """
    entries = []
    for number, line in enumerate(_whole_lines(file).split(b"\n")[:-1], 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{file}, line {number} is damaged: {error}",
                hint="Delete that line; its work will be done again.",
            ) from error
    return entries


class Journal:
    """An open journal; see :func:`open_journal`."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor

    def add(self, *entries: Any) -> None:
        """Write JSON-ready entries, and wait until they are on disk.

        The waiting takes milliseconds: entries that come together are written together.

        Raises:
            StorageError: there is no room; the journal ends with its last whole entry from before.
        """
        rest = memoryview(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        end = os.fstat(self._descriptor).st_size
        try:
            with storing(self._file):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
        except StorageError:
            os.ftruncate(self._descriptor, end)
            raise


@contextmanager
def open_journal(file: Path, *, fresh: bool = False) -> Iterator[Journal]:
    """A journal to append to, after its last whole line (``fresh``: emptied first)."""
    with storing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            os.truncate(file, 0 if fresh else len(_whole_lines(file)))
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        yield Journal(file, descriptor)
    finally:
        os.close(descriptor)


def _whole_lines(file: Path) -> bytes:
    data = file.read_bytes() if file.exists() else b""
    return data[: data.rfind(b"\n") + 1]
