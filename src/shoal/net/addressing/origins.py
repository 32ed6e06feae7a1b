"""The networks that a peer's connection comes from: limits of the directory hold for each of them."""

from __future__ import annotations

import ipaddress

from shoal.net.addressing.addresses import host_of, network_of
from shoal.policy.network.table_room import UNKNOWN, Origin

_WIDE_BITS = {4: 16, 6: 48}
"""What a provider or an organization has, for each version of IP."""


def origin_of(address: str | None) -> Origin:
    """The networks of a multiaddress as the daemon gives it; those of the relay for one behind a relay."""
    direct, circuit, _ = (address or "").partition("/p2p-circuit")
    host = host_of(direct)
    if host is None:
        return UNKNOWN
    if isinstance(host, ipaddress.IPv6Address):
        host = host.ipv4_mapped or host
    wide = ipaddress.ip_network((host, _WIDE_BITS[host.version]), strict=False)
    return Origin(network_of(address), f"{wide}{circuit}")
