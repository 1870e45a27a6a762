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
            and memory (:mod:`sam4mllm_tool.images.isolation`): for untrusted pictures.
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
    return resolve_inside(path, policy.allowed_dirs, "read")[0]


def resolve_inside(
    path: Path, allowed: tuple[Path, ...] | None, verb: str
) -> tuple[Path, Path | None]:
    """``path`` without links, and the allowed folder it lies in (``None`` if any path is allowed).

    ``~`` and ``~user`` at its beginning are home folders.

    Raises:
        AccessDenied: it lies in none of them.
        ImageError: no path at all.
    """
    try:
        resolved = path.expanduser().resolve()
        folders = None if allowed is None else [folder.resolve() for folder in allowed]
    except (OSError, RuntimeError, ValueError) as error:  # NUL, no such user
        raise ImageError(
            f"Not a usable path: {str(path)[:120]!a}.", hint="Check the path."
        ) from error
    if folders is None:
        return resolved, None
    for folder in folders:
        if resolved.is_relative_to(folder):
            return resolved, folder
    listed = ", ".join(str(folder) for folder in allowed or ())
    raise AccessDenied(
        f"The policy does not allow to {verb} {str(path)[:120]!a}.",
        hint=f"Use a path inside an allowed folder: {listed}."
        if listed
        else f"No folder may be used to {verb}; the administrator of the tools can allow one.",
    )
