"""Which pictures a folder, or a pattern such as ``photos/*.jpg``, stands for."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from sam4mllm_tool.errors import InputError

PICTURES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
"""Suffixes of pictures, lower case."""


def pictures_below(folder: Path) -> list[Path]:
    """Every picture below a folder, in the order of their paths.

    Raises:
        InputError: not a folder, or none in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint="Give a folder with pictures.")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()
    )
    if not found:
        raise InputError(
            f"{folder} holds no pictures", hint=f"Known: {', '.join(sorted(PICTURES))}."
        )
    return found


def expand_sources(sources: Iterable[str]) -> list[str]:
    """Folders and patterns replaced by their pictures, each picture once; the rest as it is.

    Raises:
        InputError: a folder without pictures, or a pattern that matches no picture.
    """
    found: dict[str, None] = {}
    for source in sources:
        if (folder := _folder(source)) is not None:
            found |= dict.fromkeys(map(str, pictures_below(folder)))
        elif not _is_address(source) and glob.has_magic(source) and not Path(source).exists():
            found |= dict.fromkeys(_fitting(source))
        else:
            found[source] = None
    return list(found)


def _fitting(pattern: str) -> list[str]:
    fitting = [
        path
        # Path.glob takes no pattern that begins at the root.
        for path in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
        if Path(path).suffix.lower() in PICTURES
    ]
    if not fitting:
        raise InputError(f"no picture matches {pattern!r}", hint="Check the pattern.")
    return fitting


def _folder(source: str) -> Path | None:
    """The folder of that name, if there is one."""
    if _is_address(source):
        return None
    try:
        path = Path(source).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError):  # too long for a path, no such user
        return None


def _is_address(source: str) -> bool:
    """Data URIs and URLs are never paths, whatever characters they hold."""
    return source.startswith("data:") or "://" in source[:32]
