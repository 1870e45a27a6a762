"""Downloading a picture from a checked address, within a deadline.

httpcore implements the protocol over a network backend of our own (:class:`_CheckedNetwork`), which
sees every connection and every read: names are resolved and checked there, the checked address is
the one connected to, and no read lasts beyond the deadline. Compressed transfer is refused: a few
kilobytes could become gigabytes.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpcore
import httpx

from sam4mllm_tool.errors import AccessDenied, ImageError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.addresses import is_public

MAX_REDIRECTS = 5
_HEADERS = (("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close"))


def fetch(url: str, policy: ImagePolicy) -> bytes:
    """Download ``url``; every address on the way, redirects included, is checked first.

    The policy's ``timeout_seconds`` cover everything: names, connections, headers and body.
    Proxies of the environment are not used, compressed transfer is not accepted.

    Raises:
        AccessDenied: network off, another scheme, or an address that is not public.
        ImageError: not a URL, unreachable, too slow, too large, compressed, or an error status.
    """
    if not policy.allow_network:
        raise AccessDenied(
            "Network access is off, so URLs cannot be opened.",
            hint="Give a file path or a data URI, or allow the network in the image policy.",
        )
    deadline = _Deadline(time.monotonic() + policy.timeout_seconds, policy.timeout_seconds)
    network = _CheckedNetwork(deadline, policy.allow_private_network)
    target = _parsed(url)
    try:
        with httpcore.ConnectionPool(_tls(), network_backend=network) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                body, location = _get(pool, target, policy)
                if location is None:
                    return body
                target = _parsed(location, base=target)
    except httpcore.TimeoutException as error:
        raise deadline.missed() from error
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        raise ImageError(
            f"Could not download the picture: {str(error)[:200] or type(error).__name__}.",
            hint="Check the URL.",
            retryable=True,
        ) from error
    raise ImageError("Too many redirects.", hint="Give the picture's final URL.")


def _get(
    pool: httpcore.ConnectionPool, url: httpx.URL, policy: ImagePolicy
) -> tuple[bytes, str | None]:
    """One request: the body, or the location it redirects to."""
    target = httpcore.URL(
        scheme=url.scheme.encode(), host=url.raw_host, port=url.port, target=url.raw_path
    )
    headers: list[tuple[str | bytes, str | bytes]] = [("Host", url.netloc), *_HEADERS]
    with pool.stream("GET", target, headers=headers) as response:
        answered = httpx.Headers(response.headers)
        if response.status in {301, 302, 303, 307, 308} and "location" in answered:
            return b"", answered["location"]
        if not 200 <= response.status < 300:
            raise ImageError(
                f"The server answered with status {response.status}.",
                hint="Check the URL.",
                retryable=response.status >= 500,
            )
        encoding = answered.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise ImageError(
                f"The server sent the picture in a compressed transfer ({encoding[:40]!r}).",
                hint="Give the URL of the plain file.",
            )
        return _read_limited(response.iter_stream(), policy.max_bytes), None


def _read_limited(chunks: Iterable[bytes], max_bytes: int) -> bytes:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise ImageError(
                f"The download is larger than {max_bytes} bytes.", hint="Use a smaller picture."
            )
    return bytes(body)


def _parsed(url: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        parsed = base.join(url) if base else httpx.URL(url)
        if not 0 < (parsed.port or 80) < 2**16:
            raise ValueError("no such port")
    except (httpx.InvalidURL, ValueError) as error:  # a bad name is a UnicodeError, so a ValueError
        raise ImageError(f"Not a URL: {url[:120]!a}.", hint="Check the URL.") from error
    if parsed.scheme not in {"http", "https"} or not parsed.raw_host:
        raise AccessDenied(
            f"Only http and https URLs can be fetched, not {url[:120]!a}.",
            hint="Give an http(s) URL, a file path or a data URI.",
        )
    return parsed


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class _Deadline:
    at: float
    seconds: float

    def left(self) -> float:
        """Seconds until the deadline.

        Raises:
            ImageError: it has passed.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def missed(self) -> ImageError:
        return ImageError(
            f"The download took longer than {self.seconds:g} s.",
            hint="Try again, or give a file path.",
            retryable=True,
        )


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to public addresses only (unless all are allowed), until the deadline."""

    def __init__(self, deadline: _Deadline, any_address: bool) -> None:
        self._deadline = deadline
        self._any_address = any_address
        self._system = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of ``host`` that answers, all of them checked before."""
        addresses = _resolved(host, port, self._deadline)
        if not self._any_address and not all(map(is_public, addresses)):
            raise AccessDenied(
                f"{host[:120]!r} leads to a private, loopback or otherwise special address.",
                hint="Give a public URL, a file path or a data URI.",
            )
        for address in addresses[:-1]:
            try:
                return self._connected(address, port)
            except httpcore.ConnectError:
                continue
        return self._connected(addresses[-1], port)

    def _connected(self, address: str, port: int) -> httpcore.NetworkStream:
        stream = self._system.connect_tcp(address, port, self._deadline.left())
        return _TimedStream(stream, self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A connection on which nothing lasts beyond the deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left())
        return _TimedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _resolved(host: str, port: int, deadline: _Deadline) -> list[str]:
    """All addresses of ``host``. The system's resolver has no deadline, so it runs in a thread."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([str(entry[4][0]).partition("%")[0] for entry in found])
        except (OSError, ValueError) as error:
            answers.put(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise deadline.missed() from None
    if isinstance(answer, Exception) or not answer:
        raise ImageError(
            f"The host {host[:120]!a} cannot be found.", hint="Check the URL.", retryable=True
        )
    return list(dict.fromkeys(answer))
