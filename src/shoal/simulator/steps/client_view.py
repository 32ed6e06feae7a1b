"""What a client knows of the swarm: records that it read some time ago, at scale only some of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from shoal.peers import ServerInfo
from shoal.policy.view import SwarmView

READ_SECONDS = 20.0
"""How often a client reads the directory."""
KEPT = 1000
"""How many records a client keeps: half of them of the nearest servers, half of random ones."""


class ClientView:
    """The view of one client, or of several at one place who read together. It is as old as the last reading."""

    def __init__(
        self,
        num_blocks: int,
        read: Callable[[], Sequence[ServerInfo]],
        round_trip: Callable[[str], float],
        rng: random.Random,
        *,
        kept: int = KEPT,
    ) -> None:
        self.view = SwarmView(num_blocks)
        self.round_trips: dict[str, float] = {}
        self._read = read
        self._round_trip = round_trip
        self._rng = rng
        self._kept = kept
        self._lost: set[str] = set()

    def refresh(self) -> None:
        """Read the directory."""
        servers = SwarmView(self.view.num_blocks, tuple(self._read())).online().servers
        known = {server.peer for server in servers}
        self._lost &= known
        for peer in known - self.round_trips.keys():
            self.round_trips[peer] = self._round_trip(peer)
        self.round_trips = {peer: self.round_trips[peer] for peer in known}
        self.view = SwarmView(self.view.num_blocks, self._sample(servers))

    def lose(self, peer: str) -> None:
        """A server does not answer: it is not used again while its record is there."""
        self._lost.add(peer)
        self.view = self.view.only(lambda server: server.peer != peer)

    def _sample(self, servers: Sequence[ServerInfo]) -> tuple[ServerInfo, ...]:
        usable = [server for server in servers if server.peer not in self._lost]
        if len(usable) <= self._kept:
            return tuple(usable)
        usable.sort(key=lambda server: self.round_trips[server.peer])
        near, far = usable[: self._kept // 2], usable[self._kept // 2 :]
        return (*near, *self._rng.sample(far, self._kept - len(near)))
