"""Which servers may push to one another, and how a client notices in a pass that two of them cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shoal.net.transport import SLOWEST_LINK
from shoal.peers import ServerInfo
from shoal.protocol import Downstream, Pong
from shoal.tensors import PACKED, Encoding

UNPUSHED_PONGS = 6
"""A server that says this often in a row that it is idle was not pushed its step, or the inputs of its pass.

A pong takes a round trip and a pause. Two servers that have not met need about as many round trips to connect.
"""
RETRY_PUSH_SECONDS = 300.0
"""How long a pair counts as broken: after that, one server may reach the other again."""


class BrokenPairs:
    """Ordered pairs of servers: lately, the first could not push to the second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}

    def add(self, upstream: str, downstream: str) -> None:
        """The server `upstream` could not push to `downstream`."""
        until = self._clock() + RETRY_PUSH_SECONDS
        self._until[upstream, downstream] = max(until, self._until.get((upstream, downstream), until))

    def add_for_good(self, upstream: str, downstream: str) -> None:
        """What `upstream` pushes to `downstream` is not to be trusted, or what that makes of it."""
        self._until[upstream, downstream] = float("inf")

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return self._until.get(pair, float("-inf")) > self._clock()

    def now(self) -> frozenset[tuple[str, str]]:
        """All pairs that are broken now."""
        return frozenset(pair for pair in self._until if pair in self)


@dataclass(frozen=True)
class PushRules:
    """How servers push to each other: in the encoding `wire`, which both have to know, and not if their pair is broken.

    With `packs`, they pack tensors where that is faster, if both can.
    """

    broken: BrokenPairs
    wire: Encoding
    packs: bool = False

    def allow(self, upstream: ServerInfo, downstream: ServerInfo) -> bool:
        """Whether the first server may push to the second."""
        knows_wire = all(self.wire in ("raw", *each.encodings) for each in (upstream, downstream))
        return knows_wire and upstream.peer != downstream.peer and (upstream.peer, downstream.peer) not in self.broken

    def downstream_of(self, upstream: ServerInfo, downstream: ServerInfo, link: str) -> Downstream:
        """What the first server is told of the second."""
        packs = self.packs and all(PACKED in each.encodings for each in (upstream, downstream))
        return Downstream(peer=downstream.peer, link=link, addresses=downstream.addresses[:8], packs=packs or None)


class AwaitedPush:
    """`num_bytes` that a server is to be pushed, once the server before has computed them: then `is_due` is set.

    They are missing if the server says `UNPUSHED_PONGS` times in a row that it is idle, and they would have come over
    the slowest link.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.is_due = asyncio.Event()
        self._num_idle_pongs = 0
        self._idle_since = 0.0

    def is_missing(self, pong: Pong, *, now: float) -> bool:
        """Whether the inputs are missing, after this pong of the server."""
        if pong.working or not self.is_due.is_set():
            self._num_idle_pongs = 0
            return False
        if not self._num_idle_pongs:
            self._idle_since = now
        self._num_idle_pongs += 1
        return self._num_idle_pongs >= UNPUSHED_PONGS and now - self._idle_since >= self.num_bytes / SLOWEST_LINK
