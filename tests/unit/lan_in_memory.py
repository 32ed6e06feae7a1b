"""A local network in memory, with members that announce and machines that listen."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Sequence

from shoal.errors import SwarmError
from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.lan import Announcement, Hear, Publish, Record
from shoal.net.own_addresses import Interface
from shoal.spans import Span

HOME: Interface = ipaddress.IPv4Interface("192.168.1.5/24")
OFFICE: Interface = ipaddress.IPv4Interface("10.0.7.5/16")
DIGEST = "0123456789abcdef"


def announcement(
    span: str = "0:12", *, digest: str = DIGEST, host: str = "192.168.1.7", port: int = 4001, model: str = "stories"
) -> Announcement:
    """What a member at this address says."""
    return Announcement(InviteCode(digest, (Way(host, port),)), model, "float32", "none", Span.parse(span), 12)


def as_heard(each: Announcement, **changes: str | bytes | None) -> Record:
    """The record of an announcement as it comes from the network, with some of its values changed."""
    values = {**each.record, **changes}
    return {
        key.encode(): value.encode() if isinstance(value, str) else value
        for key, value in values.items()
        if value != "left out"
    }


class LanInMemory:
    """What is announced is in `records`, by the names of members. With `is_broken`, there is no multicast."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.where: list[Sequence[Interface]] = []
        self.published: list[Announcement] = []
        self.attempts = 0
        self.is_broken = False
        self._listeners: list[Hear] = []

    def say(self, name: str, record: Record | None) -> None:
        """A member announces this, or takes back what it announced."""
        if record is None:
            self.records.pop(name, None)
        else:
            self.records[name] = record
        for hear in self._listeners:
            hear(name, record)

    @contextlib.asynccontextmanager
    async def announcing(self, interfaces: Sequence[Interface]) -> AsyncIterator[Publish]:
        """See `Lan`."""
        self.attempts += 1
        self._check()
        self.where.append(interfaces)

        async def publish(said: Announcement) -> None:
            self._check()
            self.published.append(said)
            self.say("me", as_heard(said))

        try:
            yield publish
        finally:
            self.say("me", None)

    @contextlib.asynccontextmanager
    async def listening(self, interfaces: Sequence[Interface], hear: Hear) -> AsyncIterator[None]:
        """See `Lan`."""
        self._check()
        self._listeners.append(hear)
        for name, record in self.records.items():
            hear(name, record)
        yield
        self._listeners.remove(hear)

    def _check(self) -> None:
        if self.is_broken:
            raise SwarmError("there is no multicast")
