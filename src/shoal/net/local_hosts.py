"""IP addresses that only their own machine can use. Imports nothing slow."""

from __future__ import annotations

import ipaddress

_DOCKER = ipaddress.ip_network("172.17.0.0/16")
"""The network of Docker's bridge, by default."""


def is_local(host: str) -> bool:
    """Whether an IP address is one that only its own machine, and the containers there, can use."""
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_link_local or address in _DOCKER
