"""Opening files inside allowed folders, whatever happens to the path meanwhile.

A path that was checked may be turned into a link before it is opened. So the folders from the
allowed one down to the file are opened one after the other, each relative to the one before and
none through a link: what is opened is inside, or nothing is. Where the system cannot open relative
to a folder (Windows), the check before is all there is.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sam4mllm_tool.errors import AccessDenied, ImageError, StorageError
from sam4mllm_tool.images.access import ImagePolicy, resolve_inside

_RELATIVE = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# With O_PATH a folder need not be listable.
_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | _NO_LINK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | _NO_LINK
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def read_file(path: Path, policy: ImagePolicy) -> bytes:
    """The content of a file that may be read.

    Raises:
        AccessDenied: it lies outside the allowed folders.
        ImageError: not a file, too large, or not readable (such as one that just became a link).
    """
    shown = ascii(str(path)[:120])
    try:
        resolved, root = resolve_inside(path, policy.allowed_dirs, "read")
        with _opened_folder(resolved.parent, root) as (folder, at):
            descriptor = os.open(folder / resolved.name, _READ, dir_fd=at)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"Not a file: {shown}.", hint="Give the path of a file.")
            check_bytes(status.st_size, policy)
            data = file.read(policy.max_bytes + 1)
    except OSError as error:
        raise ImageError(
            f"Cannot read {shown}: {error.strerror or error}.",
            hint="Check that the path is right and the file can be read.",
        ) from error
    check_bytes(len(data), policy)
    return data


def write_file(folder: str | Path, name: str, data: bytes, policy: ImagePolicy) -> Path:
    """Write a new file and return its path; the folder is made if needed.

    Nothing is overwritten: if there is ``mask.png``, the file is called ``mask-2.png``.

    Raises:
        AccessDenied: the folder may not be written to, or ``name`` is not a bare file name.
        StorageError: there is no room; nothing is left of the file.
    """
    _check_name(name)
    target, root = resolve_inside(Path(folder), policy.output_dirs, "write")
    try:
        with _opened_folder(target, root, create=True) as (inside, at):
            for free in _names(name):
                with suppress(FileExistsError):
                    descriptor = os.open(inside / free, _CREATE, 0o666, dir_fd=at)
                    break
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
            except OSError:
                os.unlink(inside / free, dir_fd=at)
                raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageError(
                f"{target} cannot be written: {error.strerror}",
                hint="Make room, or choose a folder on another disk.",
            ) from error
        raise AccessDenied(
            f"Cannot write to {str(folder)[:120]!a}: {error.strerror}.",
            hint="Choose a folder you can write to.",
        ) from error
    return target / free


def check_bytes(size: int, policy: ImagePolicy) -> None:
    """Refuse encoded pictures over the policy's limit.

    Raises:
        ImageError: so.
    """
    if size > policy.max_bytes:
        raise ImageError(
            f"The picture has {size} bytes; the limit is {policy.max_bytes}.",
            hint="Use a smaller or better compressed picture.",
        )


@contextmanager
def _opened_folder(
    folder: Path, root: Path | None, *, create: bool = False
) -> Iterator[tuple[Path, int | None]]:
    """What paths in ``folder`` begin with, and the open folder that they are relative to.

    ``folder`` has no links and lies in ``root``, below which none is followed.
    """
    root = root or folder
    if create:
        root.mkdir(parents=True, exist_ok=True)
    if not _RELATIVE:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder, None
        return
    at = os.open(root, _FOLDER)
    try:
        for step in folder.relative_to(root).parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(step, dir_fd=at)
            inner = os.open(step, _FOLDER | _NO_LINK, dir_fd=at)
            os.close(at)
            at = inner
        yield Path(), at
    finally:
        os.close(at)


def _names(name: str) -> Iterator[str]:
    """``a.png``, ``a-2.png``, ``a-3.png`` …"""
    yield name
    stem, dot, suffix = name.rpartition(".")
    for number in itertools.count(2):
        yield f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}"


def _check_name(name: str) -> None:
    bare = name not in {"", ".", ".."} and name.isprintable() and len(name.encode()) <= 200
    if not bare or "/" in name or "\\" in name:
        raise AccessDenied(
            f"{name[:80]!a} is not a file name.",
            hint="Give a short name without folders, such as 'apple.png'.",
        )
