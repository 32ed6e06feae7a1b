"""The zone of a server: a coarse place whose servers may fail together, such as by one provider or one router.

The operator can name it. Otherwise it follows from the addresses at which others reach the server, and says no more
than they do:

    a public address                      its network: /16 of IPv4, /32 of IPv6, as providers have them
    only private addresses                a digest of the local network, /24 of IPv4, /64 of IPv6
    only relays, names or other things    unknown (""): any number of homes have the local network 192.168.1.0/24
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence

_PUBLIC_BITS = {4: 16, 6: 32}
_LOCAL_BITS = {4: 24, 6: 64}
_CONTAINERS = ipaddress.ip_network("172.17.0.0/16")
"""Docker gives every machine this network, so it tells nothing."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def zone_of(addresses: Sequence[str]) -> str:
    """The zone of a server with these multiaddresses; "" if they do not tell."""
    hosts = [host for each in addresses if "/p2p-circuit" not in each and (host := _host(each)) is not None]
    for host in sorted((host for host in hosts if host.is_global), key=lambda host: (host.version, int(host))):
        return str(_network(host, _PUBLIC_BITS))
    if any("/p2p-circuit" in each for each in addresses):
        return ""
    local = [host for host in hosts if host not in _CONTAINERS]
    for host in sorted(local, key=lambda host: (host.is_loopback, host.is_link_local, host.version, int(host))):
        digest = hashlib.sha256(f"shoal zone {_network(host, _LOCAL_BITS)}".encode()).hexdigest()
        return f"local-{digest[:8]}"
    return ""


def _host(address: str) -> _Address | None:
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(parts[2])
    except ValueError:
        return None


def _network(host: _Address, bits: dict[int, int]) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network((host, bits[host.version]), strict=False)
