"""What a member announces of its swarm on a local network, and the interface to such a network.

The announcement is an invite code and a few facts. It is a hint: any machine on the network can announce
anything. What a machine joins is the invitation that has the code's digest.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from shoal.errors import SwarmError, UserError
from shoal.joining.invitation import FORMS, Invitation
from shoal.joining.invite_code import PRINTED_WAYS, InviteCode, Way, ways_of
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.net.own_addresses import Interface

_VERSION = "1"
MOST_OF_MODEL = 60
"""Characters of a model's name: a value of a TXT record has 255 bytes at most, and a line of a terminal is short."""
MOST_OF_VALUE = 255

Record: TypeAlias = Mapping[bytes, bytes | None]
"""A TXT record as it comes from the network: keys and values, with None for a key alone."""


@dataclass(frozen=True)
class Announcement:
    """What a member says about its swarm: the code to join by, the model, and the blocks that the member holds."""

    code: InviteCode
    model: str
    dtype: str
    quantization: str
    span: Span
    num_blocks: int

    @property
    def record(self) -> dict[str, str]:
        """It as a TXT record."""
        facts = {"dtype": self.dtype, "quantization": self.quantization, "blocks": str(self.span)}
        return {"v": _VERSION, "code": str(self.code), "model": self.model, **facts, "of": str(self.num_blocks)}

    @classmethod
    def parse(cls, record: Record) -> Announcement:
        """The reverse of `record`, which a stranger may have written. Raises `SwarmError` for anything else."""
        from shoal.protocol import MAX_BLOCKS  # here, because it takes a third of the time of `shoal --help`

        values = {key: _text(record.get(key.encode())) for key in ("v", "code", "model", "blocks", "of")}
        forms = {key: _text(record.get(key.encode())) for key in ("dtype", "quantization")}
        if values["v"] != _VERSION:
            raise SwarmError("an announcement of another version")
        try:
            code, span, num_blocks = InviteCode.parse(values["code"]), Span.parse(values["blocks"]), int(values["of"])
        except (UserError, ValueError) as error:
            raise SwarmError(f"an announcement that is none: {error}") from None
        model = printable(values["model"])
        if not model or not span.end <= num_blocks <= MAX_BLOCKS:
            raise SwarmError("an announcement of a model that cannot be")
        if not all(FORMS[key].fullmatch(value) for key, value in forms.items()):
            raise SwarmError("an announcement of a form of weights that cannot be")
        return cls(code, model, forms["dtype"], forms["quantization"], span, num_blocks)


def announcement_of(
    invitation: Invitation, addresses: Sequence[str], interfaces: Sequence[Interface], span: Span, num_blocks: int
) -> Announcement | None:
    """What a member at these multiaddresses announces: the ways in to it by these interfaces.

    None if it has no address there.
    """
    ways = ways_at(addresses, interfaces)[:PRINTED_WAYS]
    if not ways:
        return None
    code, model = InviteCode(invitation.digest, ways), printable(invitation.model) or "?"
    return Announcement(code, model, invitation.dtype, invitation.quantization, span, num_blocks)


def ways_at(addresses: Sequence[str], interfaces: Sequence[Interface]) -> tuple[Way, ...]:
    """The ways in that lead straight to the addresses of these interfaces."""
    hosts = {str(each.ip) for each in interfaces}
    direct = [address for address in addresses if "/p2p-circuit" not in address]
    return tuple(dict.fromkeys(way for each in direct for way in ways_of([each]) if way.host in hosts))


def is_in_networks(host: str, interfaces: Sequence[Interface]) -> bool:
    """Whether an IP address is in one of the networks of these interfaces."""
    address = ipaddress.ip_address(host)
    return any(address in each.network for each in interfaces)


def printable(text: str) -> str:
    """The start of a text that a stranger wrote, without characters that steer a terminal."""
    shown = "".join(letter for letter in text if letter.isprintable()).strip()
    return shown if len(shown) <= MOST_OF_MODEL else shown[: MOST_OF_MODEL - 1] + "…"


def _text(value: bytes | None) -> str:
    return "" if value is None else value[:MOST_OF_VALUE].decode(errors="replace")


Publish: TypeAlias = Callable[[Announcement], Awaitable[None]]
"""Announces something, in place of what was announced before. Raises `SwarmError` if the network does not take it."""
Hear: TypeAlias = Callable[[str, Record | None], None]
"""Is told the name of a member and its record, again when it changes; None when the member takes it back."""


class Lan(Protocol):
    """A local network, on which members announce their swarm and others listen."""

    def announcing(self, interfaces: Sequence[Interface]) -> AbstractAsyncContextManager[Publish]:
        """Announce by these interfaces until the context is left; then the announcement is taken back.

        Raises `SwarmError` if this machine cannot do that.
        """

    def listening(self, interfaces: Sequence[Interface], hear: Hear) -> AbstractAsyncContextManager[None]:
        """Ask by these interfaces for announcements, and listen until the context is left.

        Raises `SwarmError` if this machine cannot do that.
        """
