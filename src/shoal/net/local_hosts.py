"""IP addresses that only their own machine can use, and such as are known everywhere. Imports nothing slow."""

from __future__ import annotations

import ipaddress

_DOCKER = ipaddress.ip_network("172.17.0.0/16")
"""The network of Docker's bridge, by default."""


def is_local(host: str) -> bool:
    """Whether an IP address is one that only its own machine, and the containers there, can use."""
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_link_local or address in _DOCKER


def is_public_host(host: str) -> bool:
    """Whether a host is a name, or an IP address that is known everywhere. `::` and `0.0.0.0` are not."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return True
