"""Which addresses of the internet may be asked on an agent's behalf.

Refused is whatever is not plain global unicast: the entries of the IANA special-purpose registries
(RFC 6890, as of October 2025) whether or not the registry calls them globally reachable, and, of
IPv6, all that lies outside the block from which addresses are assigned. That covers IPv4 inside
IPv6 (compatible, NAT64, Teredo, 6to4), whose gateways would forward to the inner address.
"""

from __future__ import annotations

import ipaddress

_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a carrier's customers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, the clouds' metadata among them
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "::/3",  # loopback, IPv4-compatible, NAT64, discard-only
        "2001::/23",  # protocol assignments: Teredo, benchmarking, AMT, AS112, ORCHID, drones
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
        "4000::/2",  # unassigned, segment routing
        "8000::/1",  # unassigned, unique local, link-local, site-local, multicast
    )
)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is plain global unicast.

    An IPv4-mapped address (``::ffff:0:0/96``) is judged as the IPv4 address it stands for: the
    system connects to that one.
    """
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return not any(ip in network for network in _REFUSED)
