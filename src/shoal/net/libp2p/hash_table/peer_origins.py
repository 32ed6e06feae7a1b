"""Where the peers of the DHT are connected from. hivemind names the peer of a request, but not its address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from shoal.net.addressing.origins import origin_of
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.policy.network.table_room import UNKNOWN, Origin

LIST_SECONDS = 0.25
"""The connections are listed at most this often: strangers come as often as they like."""
OLD_SECONDS = 60.0
"""A list is this old at most: a peer may have another connection by then."""
LISTING_PART = 0.05
"""Listing takes at most about this part of the time, however many connections there are."""


class PeerOrigins:
    """The networks of the peers that the daemon is connected to. `clock` gives seconds that only grow."""

    def __init__(self, daemon: Daemon, clock: Callable[[], float] = time.monotonic) -> None:
        self._daemon = daemon
        self._clock = clock
        self._known: Mapping[str, Origin] = {}
        self._listed_at = float("-inf")
        self._pause = LIST_SECONDS
        self._listing: asyncio.Task[None] | None = None

    async def origin(self, peer: str) -> Origin:
        """The network of a peer that has just sent something; `UNKNOWN` if the list does not have it and is new."""
        age = self._clock() - self._listed_at
        if age > OLD_SECONDS or (peer not in self._known and age > self._pause):
            if self._listing is None or self._listing.done():
                self._listing = asyncio.create_task(self._list())
            await asyncio.shield(self._listing)
        return self._known.get(peer, UNKNOWN)

    async def close(self) -> None:
        """Cancel the listing that is under way."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.gather(self._listing, return_exceptions=True)

    async def _list(self) -> None:
        self._listed_at = began = self._clock()
        try:
            connections = await self._daemon.connections()
        except DaemonFailed:  # it is being restarted; this peer's records are stored again soon
            return
        # A peer may have several connections. One that is direct says more than one through a relay.
        ordered = sorted(connections, key=lambda each: each[1] is not None and "/p2p-circuit" not in each[1])
        self._known = {peer: origin_of(address) for peer, address in ordered}
        self._pause = max(LIST_SECONDS, (self._clock() - began) / LISTING_PART)
