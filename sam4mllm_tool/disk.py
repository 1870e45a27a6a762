"""Files that are whole or not there, and folders that one process writes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sam4mllm_tool.errors import InputError, StorageError


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Failures of the operating system to store something at ``path``, as a typed error.

    Raises:
        StorageError: in place of any ``OSError`` of the body.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="Make room or give access, then run the same command: it continues from what is "
            "on disk.",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a UTF-8 file at once: a reader, or a full disk, never sees half of it.

    Raises:
        StorageError: it cannot be written; the file is as it was.
    """
    scratch = path.with_name(path.name + ".part")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def exclusive(lock: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Let only one process (or thread) into the body at a time.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        lock: file to lock; it stays.
        what: what is written in the body, for the message.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: another one is in the body (retryable).
        StorageError: the lock file cannot be made.
    """
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=-1 if wait else 0)
        try:
            held.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is writing {what}",
                hint="Wait until it has ended, or choose another --out.",
                retryable=True,
            ) from error
    try:
        yield
    finally:
        held.release()
