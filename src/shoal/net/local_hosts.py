"""IP addresses that only their own machine, or a local network, can use, and such as are known everywhere.

Imports nothing slow.
"""

from __future__ import annotations

import ipaddress

_DOCKER = ipaddress.ip_network("172.17.0.0/16")
"""The network of Docker's bridge, by default."""
_LANS = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"))
)
"""Private addresses (RFC 1918, RFC 4193), and those that machines give themselves without a router (RFC 3927)."""


def is_local(host: str) -> bool:
    """Whether an IP address is one that only its own machine, and the containers there, can use."""
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_link_local or address in _DOCKER


def is_in_a_lan(host: str) -> bool:
    """Whether an IP address is one of a local network, by its number. Those of IPv6's link-local kind need a scope."""
    address = ipaddress.ip_address(host)
    return address not in _DOCKER and any(address in network for network in _LANS)


def is_public_host(host: str) -> bool:
    """Whether a host is a name, or an IP address that is known everywhere. `::` and `0.0.0.0` are not."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return True
