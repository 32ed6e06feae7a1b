"""This machine's own addresses: which to listen on, and which are of no use to others."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv6Interface
from typing import TypeAlias

import psutil

from shoal.net.addresses import ALL_HOSTS, listen_addresses
from shoal.net.local_hosts import is_in_a_lan, is_public_host

Interface: TypeAlias = IPv4Interface | IPv6Interface
"""An IP address of this machine, and the network that it is in."""

_BRIDGES = re.compile(r"(docker|podman|virbr|cni|br-|veth|lxc|lxd)\w*.*")
"""Names of network interfaces that lead to containers and virtual machines of this machine only."""
ATTEMPTS = 20


def free_addresses(host: str | None, port: int) -> tuple[str, ...]:
    """What to listen on: with both versions of IP on the same port, and only with those that this machine has.

    Without a port, one is chosen that is free. Raises `UserError` for what is no IP address or port.
    """
    wanted = listen_addresses(host, port)
    if host is not None:
        return wanted
    for _ in range(ATTEMPTS):
        chosen = port or _any_port()
        usable = tuple(each for each in listen_addresses(host, chosen) if _has_version(each))
        if port or all(map(_is_free, usable)):
            return usable or wanted
    return wanted


def bridge_hosts() -> frozenset[str]:
    """The IP addresses of this machine that only its containers and virtual machines can use."""
    return frozenset(
        address.address.partition("%")[0]
        for name, addresses in psutil.net_if_addrs().items()
        if _BRIDGES.fullmatch(name)
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    )


def lan_interfaces() -> tuple[Interface, ...]:
    """This machine's addresses in local networks, those of IPv4 first.

    Networks of its containers, tunnels, and interfaces that are down or without multicast are left out.
    """
    found: set[Interface] = set()
    stats = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        flags = stats[name].flags.split(",") if name in stats else []
        if "up" not in flags or "multicast" not in flags or "pointopoint" in flags or _BRIDGES.fullmatch(name):
            continue
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6) and each.netmask and "%" not in each.address:
                bits = int(ipaddress.ip_address(each.netmask)).bit_count()
                if is_in_a_lan(each.address):
                    found.add(ipaddress.ip_interface(f"{each.address}/{bits}"))
    return tuple(sorted(found, key=lambda each: (each.version, each.packed)))


def has_public_address(listen: Sequence[str], announce: Sequence[str]) -> bool:
    """Whether a machine that listens on these addresses, and announces those, has one that is known everywhere."""
    hosts = [address.split("/")[2] for address in announce or listen]
    if not set(hosts).isdisjoint(ALL_HOSTS):
        hosts += [
            each.address
            for addresses in psutil.net_if_addrs().values()
            for each in addresses
            if each.family in (socket.AF_INET, socket.AF_INET6)
        ]
    return any(map(is_public_host, hosts))


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _has_version(address: str) -> bool:
    return _can_bind(address, port=0)


def _is_free(address: str) -> bool:
    return _can_bind(address, port=int(address.rpartition("/")[2]))


def _can_bind(address: str, *, port: int) -> bool:
    _, version, host, *_ = address.split("/")
    with contextlib.suppress(OSError), socket.socket(_family(version)) as probe:
        if version == "ip6":
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((host, port))
        return True
    return False


def _family(version: str) -> socket.AddressFamily:
    return socket.AF_INET6 if version == "ip6" else socket.AF_INET
