"""Multiaddresses, `/ip4/203.0.113.5/tcp/31337/p2p/12D3Koo...`: checks of what users write, and the binary form."""

from __future__ import annotations

import functools
import ipaddress
import re
import struct
from collections.abc import Collection, Iterable, Sequence

from shoal.errors import UserError
from shoal.net.addressing.local_hosts import is_local, is_public_host
from shoal.net.identity import peer_id_of, peer_id_to_bytes, public_key

ALL_HOSTS = ("0.0.0.0", "::")  # noqa: S104
"""Every address of this machine, in both versions of IP."""
_HINT = "an address looks like /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW...; a peer prints its own when it starts"
_CODES = {"ip4": 4, "tcp": 6, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55, "p2p": 421, "p2p-circuit": 290}
_NAMES = {code: name for name, code in _CODES.items()}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def peer_of(address: str) -> str | None:
    """The peer id at the end of an address that can be dialled over TCP; None for any other address."""
    parts = address.split("/")
    if len(parts) < 7 or parts[0] or len(address) > 1000 or not _is_dialable(parts[1:5]):
        return None
    rest = parts[5:]
    relayed = rest[0] == "p2p" and rest[2:4] == ["p2p-circuit", "p2p"] and len(rest) == 5
    direct = rest[0] == "p2p" and len(rest) == 2
    if not (direct or relayed) or (relayed and public_key(rest[1]) is None):
        return None
    return rest[-1] if public_key(rest[-1]) is not None else None


def check_peers(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses of peers, without blanks and trailing slashes. Raises `UserError` for the first malformed one."""
    checked = tuple(address.strip().rstrip("/") for address in addresses)
    for address in checked:
        if peer_of(address) is None:
            raise UserError(f"not the address of a peer: {address!r}", hint=_HINT)
    return checked


def group_by_peer(addresses: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The addresses of each peer. Raises `UserError` for a malformed one."""
    grouped: dict[str, tuple[str, ...]] = {}
    for address in check_peers(addresses):
        peer = peer_of(address)
        assert peer is not None
        grouped[peer] = (*grouped.get(peer, ()), address)
    return grouped


def check_announced(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses that a peer announces for itself, without its peer id. Raises `UserError` for a malformed one."""
    checked = tuple(address.strip().rstrip("/") for address in addresses)
    for address in checked:
        parts = address.split("/")
        if len(parts) != 5 or parts[0] or not _is_dialable(parts[1:]):
            hint = "write how other peers reach this one, /ip4/203.0.113.5/tcp/31337 or /dns4/example.org/tcp/31337"
            raise UserError(f"not an address to announce: {address!r}", hint=hint)
    return checked


def listen_address(host: str, port: int) -> str:
    """The address to listen on. Raises `UserError` for a host that is not an IP address, and for a wrong port."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        hint = "use 127.0.0.1 for this machine only, or nothing for all of its addresses"
        raise UserError(f"not an IP address to listen on: {host!r}", hint=hint) from None
    if not 0 <= port < 1 << 16:
        raise UserError(f"not a port: {port}", hint="use 0 to let the system choose one")
    return f"/ip{version}/{host}/tcp/{port}"


def port_of(address: str) -> int | None:
    """The TCP port of an address; None if it has none."""
    match = re.search(r"/tcp/(\d+)", address)
    return int(match[1]) if match else None


def host_of(address: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address of a direct multiaddress, which another peer may have written; `None` if it has none."""
    if address is None or "/p2p-circuit" in address:
        return None
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]) if len(parts) > 2 and parts[1] in ("ip4", "ip6") else None
    except ValueError:
        return None


@functools.lru_cache(4096)
def network_of(address: str | None) -> str:
    """What one customer has, of the network that a peer is seen in: limits are shared between these, in words.

    It is the /24 or the /64 of a public address, and that of the relay for a peer behind one. In private networks,
    every machine has an address of IPv4 of its own, so it is that address.
    """
    direct, circuit, _ = (address or "").partition("/p2p-circuit")
    host = host_of(direct)
    if host is None:
        return address or "an unknown network"
    if isinstance(host, ipaddress.IPv6Address):
        host = host.ipv4_mapped or host
    bits = 64 if host.version == 6 else 24 if host.is_global else 32
    network = str(ipaddress.ip_network((host, bits), strict=False)).removesuffix("/32")
    return f"the relays in {network}" if circuit else network


def is_public(address: str) -> bool:
    """Whether a multiaddress is a direct one, with a host that is known everywhere."""
    return "/p2p-circuit" not in address and is_public_host(address.split("/")[2])


def encode(address: str) -> bytes:
    """The binary form of an address that `peer_of` or `check_announced` accepts.

    hivemind's own encoder writes a peer id inside an address as a CID, which libp2p does not read. So hivemind cannot
    encode the address of a relay.
    """
    parts = iter(address.split("/")[1:])
    encoded = b""
    for name in parts:
        encoded += _varint(_CODES[name])
        if name in ("ip4", "ip6"):
            encoded += ipaddress.ip_address(next(parts)).packed
        elif name == "tcp":
            encoded += struct.pack(">H", int(next(parts)))
        elif name != "p2p-circuit":
            value = peer_id_to_bytes(next(parts)) if name == "p2p" else next(parts).encode()
            encoded += _varint(len(value)) + value
    return encoded


def decode(encoded: bytes) -> str | None:
    """The reverse of `encode`; None for an address that shoal does not dial, such as one over UDP."""
    address, rest = "", encoded
    while rest:
        code, rest = _read_varint(rest)
        name = _NAMES.get(code)
        if name in ("ip4", "ip6"):
            size = 4 if name == "ip4" else 16
            value = str(ipaddress.ip_address(rest[:size]))
        elif name == "tcp":
            size = 2
            value = str(int.from_bytes(rest[:2], "big"))
        elif name == "p2p-circuit":
            size, value = 0, ""
        elif name is not None:
            size, rest = _read_varint(rest)
            value = peer_id_of(rest[:size]) if name == "p2p" else rest[:size].decode(errors="replace")
        else:
            return None
        address += f"/{name}/{value}" if size else f"/{name}"
        rest = rest[size:]
    return address


def most_useful_first(addresses: Sequence[str], *, bridges: Collection[str] = ()) -> tuple[str, ...]:
    """The addresses in an order that serves other peers: relayed ones, this machine's own, those that others can't use.

    Relayed ones come first, because a peer has them only if others cannot dial it. `bridges` are IP addresses that only
    containers of this machine can use.
    """

    def rank(address: str) -> int:
        _, kind, host, *_ = address.split("/")
        if "/p2p-circuit" in address:
            return 0
        return 1 if kind not in ("ip4", "ip6") or not (is_local(host) or host in bridges) else 2

    return tuple(sorted(addresses, key=rank))


def listen_addresses(host: str | None, port: int) -> tuple[str, ...]:
    """The addresses to listen on; without a host, all of this machine's, IPv4 and IPv6. Raises `UserError`."""
    return tuple(listen_address(each, port) for each in (ALL_HOSTS if host is None else (host,)))


def _is_dialable(parts: Sequence[str]) -> bool:
    """Whether these four parts are a host and a TCP port that can be dialled."""
    kind, host, protocol, port = parts
    if protocol != "tcp" or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 1 << 16:
        return False
    if kind in ("dns", "dns4", "dns6"):
        return _NAME.fullmatch(host) is not None
    try:
        return kind in ("ip4", "ip6") and ipaddress.ip_address(host).version == int(kind[2])
    except ValueError:
        return False


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + _varint(number // 128)


def _read_varint(data: bytes) -> tuple[int, bytes]:
    """The number at the beginning, and the bytes behind it; -1 if there is no complete number."""
    number = 0
    for index, byte in enumerate(data):
        number += (byte % 128) << (7 * index)
        if byte < 128:
            return number, data[index + 1 :]
    return -1, b""
