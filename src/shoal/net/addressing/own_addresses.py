"""This machine's own addresses: which to listen on, and which are of no use to others."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Interface, IPv6Interface
from typing import TypeAlias

import psutil

from shoal.net.addressing.addresses import ALL_HOSTS, host_of, listen_addresses
from shoal.net.addressing.local_hosts import is_in_a_lan, is_public_host

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
        chosen = port or any_port()
        usable = tuple(each for each in listen_addresses(host, chosen) if _has_version(each))
        if port or all(map(_is_free, usable)):
            return usable or wanted
    return wanted


def bridge_hosts() -> frozenset[str]:
    """The IP addresses of this machine that only its containers and virtual machines can use."""
    return frozenset(str(each.ip) for name, each in _interfaces() if _BRIDGES.fullmatch(name))


def lan_interfaces() -> tuple[Interface, ...]:
    """This machine's addresses in local networks, those of IPv4 first.

    Networks of its containers, tunnels, and interfaces that are down or without multicast are left out.
    """
    stats = psutil.net_if_stats()

    def is_shared(each: Interface) -> bool:
        is_scoped = each.version == 6 and each.is_link_local
        return each.network.prefixlen < each.max_prefixlen and is_in_a_lan(str(each.ip)) and not is_scoped

    def is_usable(name: str) -> bool:
        flags = stats[name].flags.split(",") if name in stats else []
        is_up = "up" in flags and "multicast" in flags and "pointopoint" not in flags
        return is_up and not _BRIDGES.fullmatch(name)

    found = {each for name, each in _interfaces() if is_usable(name) and is_shared(each)}
    return tuple(sorted(found, key=lambda each: (each.version, each.packed)))


def has_public_address(listen: Sequence[str], announce: Sequence[str]) -> bool:
    """Whether a machine that listens on these addresses, and announces those, has one that is known everywhere."""
    hosts = [address.split("/")[2] for address in announce or listen]
    if not set(hosts).isdisjoint(ALL_HOSTS):
        hosts += [str(each.ip) for each in own_networks()]
    return any(map(is_public_host, hosts))


def places_of(listen: Sequence[str]) -> tuple[str, ...]:
    """Where a machine that listens on these addresses is found: those for all of its addresses, one by one."""
    places = []
    for address in listen:
        _, version, host, _, port = address.split("/")
        hosts = [host]
        if host in ALL_HOSTS:
            wanted = 4 if version == "ip4" else 6
            hosts = [str(each.ip) for each in own_networks() if each.version == wanted and not each.is_link_local]
        places += [f"/{version}/{each}/tcp/{port}" for each in hosts]
    return tuple(dict.fromkeys(places))


def own_networks() -> tuple[Interface, ...]:
    """This machine's IP addresses with the networks that they are in."""
    return tuple(each for _, each in _interfaces())


def is_outside(address: str, networks: Sequence[Interface]) -> bool:
    """Whether a multiaddress is of a machine that is in none of these networks, and known everywhere."""
    host = host_of(address)
    if host is None or not host.is_global:
        return False
    return not any(host in each.network for each in networks if each.version == host.version)


def _interfaces() -> Iterator[tuple[str, Interface]]:
    """This machine's IP addresses with their networks, and the names of their network interfaces."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                bits = int(ipaddress.ip_address(each.netmask)).bit_count() if each.netmask else ""
                yield name, ipaddress.ip_interface(f"{each.address.partition('%')[0]}/{bits}".rstrip("/"))


def any_port() -> int:
    """A TCP port that is free now."""
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
