"""How others reach a peer, in words for its operator, and what to do where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from shoal.net.addressing.addresses import host_of, port_of
from shoal.policy.network.reachability import DialReport, Reach, Reachability


def in_words(reach: Reach, addresses: Sequence[str]) -> str:
    """One line about a peer with these addresses, and what to do if others do not reach it."""
    hint = to_do(reach, addresses)
    return f"{finding(reach)}; {hint}" if hint else finding(reach)


def finding(reach: Reach) -> str:
    """How others reach the peer."""
    outside = [report for report in reach.reports if report.is_outside]
    asked = outside or reach.reports
    tried = f"{len(asked)} {'peers' if len(asked) > 1 else 'peer'}{' outside of its network' if outside else ''} tried"
    match reach.kind:
        case Reachability.UNKNOWN:
            return "no other peer has tried yet to reach this machine"
        case Reachability.DIRECT:
            return f"other machines reach this one directly ({tried})"
        case Reachability.RELAYED:
            count = len(reach.relayed)
            return f"other machines reach this one through {count} {'relays' if count > 1 else 'relay'}"
        case Reachability.UNREACHABLE:
            relays = f"no relay carries its streams ({'; '.join(reach.refused)})" if reach.refused else ""
            if not asked:  # its operator has named relays
                return relays or "no relay carries the streams of this machine"
            return f"other machines cannot dial this one ({tried}), and {relays or 'there is no relay for it'}"


def to_do(reach: Reach, addresses: Sequence[str]) -> str:
    """What helps if others do not reach the peer; nothing if they do."""
    if reach.kind is not Reachability.UNREACHABLE:
        return ""
    if not reach.reports:
        return "name other relays, or none: members with a public address are found"
    port = next((port for address in addresses if (port := port_of(address))), None)
    host = seen_host(reach.reports)
    if host is None or not host.is_global:
        return f"open TCP port {port} in the firewall of this machine"
    announced = f"/ip{host.version}/{host}/tcp/{port}"
    opens = f"open TCP port {port} in the router"
    if not any(address.startswith(f"{announced}/") for address in addresses):
        opens += f" and use --port {port} --announce {announced}"
    return f"{opens}, or let a machine with a public address join, which relays"


def seen_host(reports: Sequence[DialReport]) -> IPv4Address | IPv6Address | None:
    """The host at which most others see the peer, of those outside if there are any; `None` if none of them said it."""
    outside = [report for report in reports if report.is_outside] or reports
    seen = [host for report in outside if (host := host_of(report.seen_at)) is not None]
    return max(sorted(set(seen), key=str), key=seen.count) if seen else None
