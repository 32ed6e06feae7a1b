"""The network that a peer's connection comes from. Limits hold for each, because identities cost nothing."""

from __future__ import annotations

import ipaddress

from shoal.net.addressing.addresses import host_of
from shoal.policy.network.table_room import UNKNOWN, Origin

_BITS = {4: (24, 16), 6: (64, 48)}
"""The narrow and the wide part of an address, for each version of IP."""
_CIRCUIT = "/p2p-circuit"


def origin_of(address: str | None) -> Origin:
    """The network of a multiaddress as the daemon gives it; that of the relay for one behind a relay."""
    if address is None:
        return UNKNOWN
    direct, is_relayed, _ = address.partition(_CIRCUIT)
    host = host_of(direct)
    if host is None:
        return UNKNOWN
    narrow, wide = (str(ipaddress.ip_network((host, bits), strict=False)) for bits in _BITS[host.version])
    return Origin(f"behind {narrow}", f"behind {wide}") if is_relayed else Origin(narrow, wide)
