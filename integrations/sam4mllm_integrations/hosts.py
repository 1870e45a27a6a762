"""Which names an HTTP server answers to: a web page must not reach it under a name of its own."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def served_names(host: str, allowed_hosts: Sequence[str] = ()) -> list[str]:
    """The hosts that requests may be addressed to, as the Host header writes them, without ports.

    Args:
        host: address that the server listens on.
        allowed_hosts: further names, such as a proxy's.
    """
    names = [*_LOOPBACK, *allowed_hosts]
    if host in {"0.0.0.0", "::"}:
        names += _names_of_this_machine()
    names.append(f"[{host}]" if ":" in host else host)
    return list(dict.fromkeys(name.lower() for name in names))


def _names_of_this_machine() -> list[str]:
    import psutil

    addresses = [
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in {socket.AF_INET, socket.AF_INET6}
    ]
    names = [f"[{address}]" if ":" in address else address for address in addresses]
    return [socket.gethostname(), socket.getfqdn(), *names]
