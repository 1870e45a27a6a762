"""Which files may be read and written on an agent's behalf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sam4mllm_tool.errors import AccessDenied, ImageError


@dataclass(frozen=True)
class ImagePolicy:
    """What an image source may be.

    Attributes:
        allowed_dirs: folders that may be read from, symlinks resolved; ``None`` = any path.
        output_dirs: folders that may be written to; ``None`` = any path. None are by default: what
            may be read may not be written.
        allow_network: whether http(s) URLs may be fetched. Proxies of the environment are not
            used: only a direct connection lets the address be checked.
        allow_private_network: whether they may lead to loopback, private or link-local addresses.
        max_pixels: limit on width × height, checked before decoding.
        max_bytes: limit on the encoded size of a file, data URI or download.
        timeout_seconds: limit on a whole download.
        isolated: whether files and bytes are decoded in a worker process with limits on CPU time
            and memory (:mod:`sam4mllm_tool.images.isolation`): for pictures from strangers.
    """

    allowed_dirs: tuple[Path, ...] | None = None
    output_dirs: tuple[Path, ...] | None = ()
    allow_network: bool = False
    allow_private_network: bool = False
    max_pixels: int = 50_000_000
    max_bytes: int = 64 * 1024**2
    timeout_seconds: float = 20.0
    isolated: bool = False


def readable_path(path: Path, policy: ImagePolicy) -> Path:
    """Resolve ``path`` and check that it lies in a folder that may be read.

    Raises:
        AccessDenied: it lies outside (whether or not it exists).
    """
    return _resolve_inside(path, policy.allowed_dirs, "read")


def safe_output_path(folder: str | Path, name: str, policy: ImagePolicy) -> Path:
    """Path of the file ``name`` in ``folder``, which is created if needed; for writing.

    Raises:
        AccessDenied: the folder (symlinks resolved) may not be written to, or ``name`` is not a
            bare file name.
    """
    bare = name not in {"", ".", ".."} and name.isprintable() and len(name.encode()) <= 200
    if not bare or "/" in name or "\\" in name:
        raise AccessDenied(
            f"{name[:80]!r} is not a file name.",
            hint="Give a short name without folders, such as 'apple.png'.",
        )
    directory = _resolve_inside(Path(folder).expanduser(), policy.output_dirs, "write")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccessDenied(
            f"Cannot create the folder {directory}: {error.strerror}.",
            hint="Choose a folder you can write to.",
        ) from error
    return _resolve_inside(directory / name, policy.output_dirs, "write")


def _resolve_inside(path: Path, allowed: tuple[Path, ...] | None, verb: str) -> Path:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # symlink loop, NUL character
        raise ImageError(
            f"Not a usable path: {str(path)[:120]!r}.", hint="Check the path."
        ) from error
    if allowed is None or any(resolved.is_relative_to(folder.resolve()) for folder in allowed):
        return resolved
    folders = ", ".join(str(folder) for folder in allowed)
    raise AccessDenied(
        f"The policy does not allow to {verb} {str(path)[:120]!r}.",
        hint=f"Use a path inside an allowed folder: {folders}."
        if folders
        else f"No folder may be used to {verb}; whoever runs the tools can allow one.",
    )
