"""The kinds of NAT, as nftables' rules of a home's router: how it maps what leaves, and what it lets in.

The names are those of RFC 3489. The router keeps the source port of what leaves if it can, as most do, but for the
symmetric kind. What comes unasked is dropped without an answer.
"""

from __future__ import annotations

from enum import StrEnum


class Nat(StrEnum):
    """A kind of NAT."""

    FULL_CONE = "full cone"
    """One port for each port inside, to all destinations. All hosts may send to it."""
    PORT_RESTRICTED = "port-restricted"
    """The same port to all destinations. Only hosts and ports that were sent to may answer. The most common kind."""
    SYMMETRIC = "symmetric"
    """Another port, at random, to each destination. Only that destination may answer."""


def rules(nat: Nat) -> str:
    """What a router with the interfaces `wan` and `lan` gives to `nft -f`."""
    masquerade = "masquerade fully-random" if nat is Nat.SYMMETRIC else "masquerade"
    lets_all_in = nat is Nat.FULL_CONE
    # A connection that comes to a mapped port goes on to the host inside to which the port belongs.
    inward = 'iifname "wan" dnat ip to meta l4proto . th dport map @inside' if lets_all_in else ""
    remember = 'oifname "wan" update @inside { meta l4proto . th sport : ip saddr . th sport }' if lets_all_in else ""
    return f"""
table ip nat {{
    map inside {{
        type inet_proto . inet_service : ipv4_addr . inet_service
        flags dynamic, timeout
        timeout 5m
    }}
    chain arriving {{
        type nat hook prerouting priority dstnat
        {inward}
    }}
    chain leaving {{
        type nat hook postrouting priority srcnat
        oifname "wan" {masquerade}
    }}
    chain passing {{
        type filter hook forward priority filter
        {remember}
        ct status dnat accept
        iifname "wan" ct state new drop
    }}
    chain itself {{
        type filter hook input priority filter
        iifname "wan" meta l4proto {{ tcp, udp }} ct state new drop
    }}
}}
"""
