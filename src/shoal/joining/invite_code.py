"""Invite codes: short enough to read out, with a check of what was heard.

A code is the digest of an invitation and some ways in, in Crockford's base 32, which has no letters that look alike:
`1G4X-9QRT-...`. A way in is a host and a port. Which peer answers there, the network tells; what it may offer, the
digest decides. The code of a closed swarm has its key too: who has the code is let in. The last two characters check
the others.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from shoal.errors import UserError
from shoal.joining.invitation import DIGEST_BYTES
from shoal.net.addressing.local_hosts import is_local
from shoal.net.swarm_key import KEY_BYTES, SwarmKey

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
MAX_WAYS = 7
PRINTED_WAYS = 3
"""The ways in that a printed code has: each makes it 10 characters longer."""
_OPEN, _CLOSED = 1, 2
"""The versions of codes without and with a swarm key."""
_CHECK_CHARACTERS = 2
_GROUP = 4
_LOOK_ALIKES = str.maketrans({"O": "0", "I": "1", "L": "1", "-": None, " ": None, "_": None})
_GROUPS = re.compile(r"([0-9A-Z]{4}-){5,}[0-9A-Z]{1,4}", re.ASCII | re.IGNORECASE)
_HINT = "ask for the code again; it looks like 1G4X-9QRT-..., and letters and digits that look alike are the same"


@dataclass(frozen=True)
class Way:
    """Where a member listens: an IP address and a TCP port."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """The multiaddress, without a peer."""
        return f"/ip{ipaddress.ip_address(self.host).version}/{self.host}/tcp/{self.port}"


@dataclass(frozen=True)
class InviteCode:
    """The digest of an `Invitation`, in hexadecimal, 1 to `MAX_WAYS` ways in, and the key of a closed swarm."""

    digest: str
    ways: tuple[Way, ...]
    swarm_key: SwarmKey | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """The multiaddresses of the ways in, without peers."""
        return tuple(way.address for way in self.ways)

    def __str__(self) -> str:
        kinds = 0
        body = b""
        for index, way in enumerate(self.ways):
            address = ipaddress.ip_address(way.host)
            kinds |= (address.version == 6) << index
            body += address.packed + way.port.to_bytes(2, "big")
        version, secret = (_OPEN, b"") if self.swarm_key is None else (_CLOSED, self.swarm_key.secret)
        data = bytes([version << 4 | len(self.ways), kinds]) + bytes.fromhex(self.digest) + secret + body
        text = _to_base32(data)
        text += _check(text)
        return "-".join(text[at : at + _GROUP] for at in range(0, len(text), _GROUP))

    @classmethod
    def parse(cls, text: str) -> InviteCode:
        """The code that a user typed. Raises `UserError` for anything else, with what is wrong with it."""
        typed = text.strip().upper().translate(_LOOK_ALIKES)
        if len(typed) <= _CHECK_CHARACTERS or not set(typed) <= set(ALPHABET):
            raise UserError(f"not an invite code: {text[:80]!r}", hint=_HINT)
        if _check(typed[:-_CHECK_CHARACTERS]) != typed[-_CHECK_CHARACTERS:]:
            raise UserError("this invite code has a mistake in it, or a part is missing", hint=_HINT)
        data = _from_base32(typed[:-_CHECK_CHARACTERS])
        version, count, kinds, rest = data[0] >> 4, data[0] & 15, data[1], data[2:]
        digest, rest = rest[:DIGEST_BYTES], rest[DIGEST_BYTES:]
        key = None
        if version == _CLOSED:
            key, rest = SwarmKey(rest[:KEY_BYTES]), rest[KEY_BYTES:]
        ways = []
        for index in range(count):
            size = 16 if kinds >> index & 1 else 4
            ways.append(Way(str(ipaddress.ip_address(rest[:size])), int.from_bytes(rest[size : size + 2], "big")))
            rest = rest[size + 2 :]
        if not all(way.port for way in ways):
            raise UserError("this invite code has a way in that cannot be", hint=_HINT)
        return cls(digest.hex(), tuple(ways), key)


def is_code(text: str) -> bool:
    """Whether a user means an invite code with this text, and not a model: it is one, or looks like one."""
    if _GROUPS.fullmatch(text.strip()):
        return True
    try:
        InviteCode.parse(text)
    except UserError:
        return False
    return True


def code_in(text: str) -> InviteCode | None:
    """The invite code that a user means with this text; None for a model. Raises `UserError` if it has a mistake."""
    return InviteCode.parse(text) if is_code(text) else None


def ways_of(addresses: Sequence[str], *, most: int = MAX_WAYS, without: Collection[str] = ()) -> tuple[Way, ...]:
    """Ways in from the addresses of members, in their order, each host and port once. A relayed one leads to the relay.

    Addresses that only their own machine or its containers can use are left out if there are others, and so are those
    of IPv6, each of which makes a code 28 characters longer. `without`: the same for these hosts.
    """
    found: dict[Way, None] = {}
    for address in addresses:
        if (way := _way(address)) is not None:
            found[way] = None
    useful = [way for way in found if not is_for_this_machine(way) and way.host not in without]
    short = [way for way in useful if ":" not in way.host]
    return tuple((short or useful or list(found))[:most])


def in_turn(*members: Sequence[str]) -> list[str]:
    """The first address of each member, then the second ones: a code with some of them should outlive a member."""
    return [each for each in chain.from_iterable(zip_longest(*members)) if each is not None]


def _way(address: str) -> Way | None:
    """The way in of a multiaddress, which a stranger may have written. That of a relayed one leads to the relay."""
    parts = address.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        return None
    try:
        host, port = ipaddress.ip_address(parts[2]), int(parts[4])
    except ValueError:
        return None
    is_sound = parts[1] == f"ip{host.version}" and "%" not in parts[2] and 0 < port < 1 << 16
    return Way(str(host), port) if is_sound else None


def is_for_this_machine(way: Way) -> bool:
    """Whether only this machine and its containers can use a way."""
    return is_local(way.host)


def _check(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")
    return "".join(ALPHABET[number >> 5 * index & 31] for index in range(_CHECK_CHARACTERS))


def _to_base32(data: bytes) -> str:
    """The bytes as digits, the first of which are the highest; with a 1 before them, which keeps leading zeros."""
    number = int.from_bytes(b"\1" + data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 32)
        digits = ALPHABET[digit] + digits
    return digits


def _from_base32(text: str) -> bytes:
    number = 0
    for character in text:
        number = number * 32 + ALPHABET.index(character)
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    size = 2 + DIGEST_BYTES
    if len(data) <= size or data[0] != 1:
        raise UserError("this invite code has a mistake in it, or a part is missing", hint=_HINT)
    version = data[1] >> 4
    if version not in (_OPEN, _CLOSED):
        raise UserError("this invite code is of another version of shoal", hint="use the same version")
    size += KEY_BYTES * (version == _CLOSED)
    if len(data) - 1 != size + _ways_bytes(data[1:]):
        raise UserError("this invite code has a mistake in it, or a part is missing", hint=_HINT)
    return data[1:]


def _ways_bytes(data: bytes) -> int:
    count, kinds = data[0] & 15, data[1]
    if not 0 < count <= MAX_WAYS or kinds >> count:
        return -1
    return sum(18 if kinds >> index & 1 else 6 for index in range(count))
