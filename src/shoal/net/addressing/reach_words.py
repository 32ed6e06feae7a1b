"""How others reach a peer, in words for its operator, and what to do where they cannot."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.net.addressing.addresses import port_of
from shoal.net.addressing.local_hosts import is_public_host
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
            return f"other machines cannot reach this one ({tried}), and there is no relay for it"


def to_do(reach: Reach, addresses: Sequence[str]) -> str:
    """What helps if others do not reach the peer; nothing if they do."""
    if reach.kind is not Reachability.UNREACHABLE:
        return ""
    port = next((port for address in addresses if (port := port_of(address))), None)
    host = seen_host(reach.reports)
    if host is None or not is_public_host(host):
        return f"open TCP port {port} in the firewall of this machine"
    version = "ip6" if ":" in host else "ip4"
    return (
        f"open TCP port {port} in the router and use --port {port} --announce /{version}/{host}/tcp/{port}, "
        "or let a machine with a public address join, which relays"
    )


def seen_host(reports: Sequence[DialReport]) -> str | None:
    """The host at which most others see the peer, those outside first; `None` if none of them said it."""
    parts = [report.seen_at.split("/") for report in reports if report.seen_at is not None]
    seen = [each[2] for each in parts if len(each) > 2 and each[1] in ("ip4", "ip6")]
    outside = [host for host in seen if is_public_host(host)]
    candidates = outside or seen
    return max(sorted(set(candidates)), key=candidates.count) if candidates else None
