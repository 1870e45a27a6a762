"""Which files may be read and written, and which addresses asked, on an agent's behalf."""

from __future__ import annotations

import ipaddress
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

from sam4mllm_tool.errors import AccessDenied, ImageError

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
# IPv6 ranges that carry an IPv4 address inside: NAT64 and 6to4 gateways would forward to it.
_IPV4_CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))


@dataclass(frozen=True)
class ImagePolicy:
    """What an image source may be.

    Attributes:
        allowed_dirs: folders that may be read from, symlinks resolved; ``None`` = any path.
        output_dirs: folders that may be written to; ``None`` = the same as ``allowed_dirs``.
        allow_network: whether http(s) URLs may be fetched. Proxies of the environment are not
            used: only a direct connection lets the address be checked.
        allow_private_network: whether they may lead to loopback, private or link-local addresses.
        max_pixels: limit on width × height, checked before decoding.
        max_bytes: limit on the encoded size of a file, data URI or download.
        timeout_seconds: limit on a whole download.
    """

    allowed_dirs: tuple[Path, ...] | None = None
    output_dirs: tuple[Path, ...] | None = None
    allow_network: bool = False
    allow_private_network: bool = False
    max_pixels: int = 50_000_000
    max_bytes: int = 64 * 1024**2
    timeout_seconds: float = 20.0


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
    allowed = policy.allowed_dirs if policy.output_dirs is None else policy.output_dirs
    directory = _resolve_inside(Path(folder).expanduser(), allowed, "write")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccessDenied(
            f"Cannot create the folder {directory}: {error.strerror}.",
            hint="Choose a folder you can write to.",
        ) from error
    return _resolve_inside(directory / name, allowed, "write")


def _resolve_inside(path: Path, allowed: tuple[Path, ...] | None, verb: str) -> Path:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # symlink loop, NUL character
        raise ImageError(
            f"Not a usable path: {str(path)[:120]!r}.", hint="Check the path."
        ) from error
    if allowed is None or any(resolved.is_relative_to(folder.resolve()) for folder in allowed):
        return resolved
    folders = ", ".join(str(folder) for folder in allowed) or "none"
    raise AccessDenied(
        f"The policy does not allow to {verb} {str(path)[:120]!r}.",
        hint=f"Use a path inside an allowed folder: {folders}.",
    )


def fetch(url: str, policy: ImagePolicy) -> bytes:
    """Download ``url``; each address on the way, redirects included, is checked before connecting.

    Raises:
        AccessDenied: network off, or a private, loopback or link-local address.
        ImageError: unreachable, too slow, too large, or an error status.
    """
    if not policy.allow_network:
        raise AccessDenied(
            "Network access is off, so URLs cannot be opened.",
            hint="Give a file path or a data URI, or allow the network in the image policy.",
        )
    import httpx

    deadline = time.monotonic() + policy.timeout_seconds
    try:
        with httpx.Client(timeout=policy.timeout_seconds, trust_env=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                body, redirect = _get(client, url, policy, deadline)
                if redirect is None:
                    return body
                url = urljoin(url, redirect)
    except httpx.HTTPError as error:
        raise ImageError(
            f"Could not download the picture: {error or type(error).__name__}.",
            hint="Check the URL.",
            retryable=True,
        ) from error
    raise ImageError("Too many redirects.", hint="Give the picture's final URL.")


def _get(
    client: httpx.Client, url: str, policy: ImagePolicy, deadline: float
) -> tuple[bytes, str | None]:
    """One request: the body, or the location it redirects to.

    The connection goes to the address that was checked, not to the name, which might resolve
    differently the second time.
    """
    parts = _split(url)
    host = parts.hostname or ""
    address = _checked_address(host, parts.port or (443 if parts.scheme == "https" else 80), policy)
    netloc = f"[{address}]" if ":" in address else address
    if parts.port:
        netloc += f":{parts.port}"
    pinned = parts._replace(netloc=netloc, fragment="").geturl()
    headers = {"Host": parts.netloc.rpartition("@")[2], "Accept": "image/*"}
    with client.stream(
        "GET", pinned, headers=headers, extensions={"sni_hostname": host}
    ) as response:
        if response.has_redirect_location:
            return b"", response.headers["location"]
        if not response.is_success:
            raise ImageError(
                f"The server answered with status {response.status_code}.",
                hint="Check the URL.",
                retryable=response.is_server_error,
            )
        return _read_limited(response, policy, deadline), None


def _read_limited(response: httpx.Response, policy: ImagePolicy, deadline: float) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > policy.max_bytes:
            raise ImageError(
                f"The download is larger than {policy.max_bytes} bytes.",
                hint="Use a smaller picture.",
            )
        if time.monotonic() > deadline:
            raise ImageError(
                f"The download took longer than {policy.timeout_seconds:g} s.",
                hint="Try again, or give a file path.",
                retryable=True,
            )
    return bytes(body)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - parsing it may raise
    except ValueError as error:
        raise ImageError(f"Not a URL: {url[:120]!r}.", hint="Check the URL.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise AccessDenied(
            f"Only http and https URLs can be fetched, not {url[:120]!r}.",
            hint="Give an http(s) URL, a file path or a data URI.",
        )
    return parts


def _checked_address(host: str, port: int, policy: ImagePolicy) -> str:
    """An address of ``host``, after checking that none of its addresses is forbidden."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(
            f"The host {host[:120]!r} cannot be found.", hint="Check the URL.", retryable=True
        ) from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not policy.allow_private_network and not all(map(_is_public, addresses)):
        raise AccessDenied(
            f"{host[:120]!r} leads to a private, loopback or link-local address.",
            hint="Give a public URL, a file path or a data URI.",
        )
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _IPV4_CARRIERS):
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast
