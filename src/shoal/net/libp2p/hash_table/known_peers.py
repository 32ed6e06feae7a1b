"""Remembers the peers of the DHT, and rejoins it after a loss of the network.

hivemind removes a peer from its routing table, and bans it for a while, as soon as one request is not answered, and
never looks for it again: a few seconds without network empty the table for good. So this peer remembers the peers that
were in the table, pings those that are missing, and tells "no peer answers" from "there are no other peers".
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from hivemind.p2p import PeerID

from shoal.net.addressing.addresses import group_by_peer
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.records import Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ServerState

logger = logging.getLogger(__name__)

MAX_KNOWN = 64
"""The peers that are remembered, the latest ones: each costs a ping when the table is empty."""
CHECK_SECONDS = 10.0
"""The interval in which the peers that are missing from the table are pinged."""
REDIAL_SECONDS = 3.0
"""How long dialling one peer may take: all are dialled at once, and a request waits for it."""
FORGET_SECONDS = 3600.0
"""A peer that was not in the table for this long is forgotten."""


class KnownPeers:
    """The peers by which this one can rejoin the DHT: its initial peers, and those that were in its table lately.

    `attach` it to every new node; `close` it at the end. `stores_records`: this peer stores records for others.
    """

    def __init__(
        self,
        own_peer: str,
        *,
        initial_peers: Sequence[str],
        stores_records: bool,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self._own_peer = own_peer
        self._initial = {peer: where for peer, where in group_by_peer(initial_peers).items() if peer != own_peer}
        self.stores_records = stores_records
        self._check_seconds = check_seconds
        self._daemon: Daemon | None = None
        self._node: Any = None
        self._last_seen: dict[str, float] = {}  # when each peer was in the table, the latest at the end
        self._announcements: dict[str, Announcement] = {}  # the latest of each peer
        self._last_contact: float | None = None  # when any peer was in the table
        self._rejoining: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    def attach(self, daemon: Daemon, node: Any) -> None:
        """Use this node's routing table and this daemon from now on."""
        self._daemon, self._node = daemon, node
        self._update()
        if self._checking is None:
            self._checking = asyncio.create_task(self._check())

    async def close(self) -> None:
        """Cancel what `attach` and `rejoin` have started."""
        tasks = [task for task in (self._checking, self._rejoining) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def record(self, announcement: Announcement) -> None:
        """Remember the addresses that a known peer announces, or that it leaves."""
        peer = announcement.peer
        if peer in self._last_seen and (
            peer not in self._announcements or self._announcements[peer].expires < announcement.expires
        ):
            self._announcements[peer] = announcement

    @property
    def is_isolated(self) -> bool:
        """Whether the table is empty although it was not empty before, and not all of its peers announced to leave.

        For a peer that stores records this holds no longer than `MAX_LIFETIME`: all announcements of the others have
        expired then, and the peer continues the swarm alone.
        """
        return not self._update() and self.expects_answers

    @property
    def expects_answers(self) -> bool:
        """Whether there were other peers, of which some should still be there: then no answer at all is a failure.

        The table alone does not tell it: a peer in it that does not answer counts as present when its ban is over.
        """
        if self._last_contact is None or all(map(self._has_left, self._known())):
            return False
        return not self.stores_records or time.monotonic() - self._last_contact < MAX_LIFETIME

    async def rejoin(self) -> None:
        """Ping all known peers; those that answer are in the table again. Concurrent calls share one attempt."""
        if self._rejoining is None or self._rejoining.done():
            self._rejoining = asyncio.create_task(self._rejoin())
        await asyncio.shield(self._rejoining)

    def _known(self) -> set[str]:
        return self._initial.keys() | self._last_seen.keys()

    def _has_left(self, peer: str) -> bool:
        return peer in self._announcements and self._announcements[peer].state is ServerState.LEAVING

    def _update(self) -> set[str]:
        """Remember the peers in the table. Returns those that hivemind sends requests to."""
        table, banned = self._node.protocol.routing_table.peer_id_to_uid, self._node.blacklist
        present = {peer.to_base58() for peer in table if peer not in banned} - {self._own_peer}
        now = time.monotonic()
        if present:
            self._last_contact = now
        for peer in present:
            self._last_seen.pop(peer, None)
            self._last_seen[peer] = now
        for peer in [*self._last_seen]:
            if len(self._last_seen) > MAX_KNOWN or now - self._last_seen[peer] > FORGET_SECONDS:
                del self._last_seen[peer]
                self._announcements.pop(peer, None)
        return present

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(self._check_seconds)
            present = self._update()
            if present:
                await self._ping(self._known() - present)
            else:
                await self.rejoin()

    async def _rejoin(self) -> None:
        known = self._known()
        await self._ping(known)
        if not self._update():
            await asyncio.gather(*(self._dial(peer) for peer in known))
            await self._ping(known)
        if known and self._update():
            # All peers were silent at once, so the fault was this machine's network and the bans are lifted. Before
            # one of them has answered they stay, because a peer in the table that is not banned counts as present.
            self._node.blacklist.clear()
            logger.info("connected to the directory again")

    async def _ping(self, peers: Iterable[str]) -> None:
        node = self._node

        async def ping(peer: str) -> None:
            peer_id = PeerID.from_base58(peer)
            # An answer puts each of the two peers into the other's table; a missing answer is no error.
            if await node.protocol.call_ping(peer_id) is not None:
                node.blacklist.register_success(peer_id)

        await asyncio.gather(*(ping(peer) for peer in peers))

    async def _dial(self, peer: str) -> None:
        announced = self._announcements[peer].server_info.addresses if peer in self._announcements else ()
        addresses = dict.fromkeys((*self._initial.get(peer, ()), *announced))
        assert self._daemon is not None
        try:
            async with asyncio.timeout(REDIAL_SECONDS):
                await self._daemon.connect(peer, [*addresses])
        except (DaemonFailed, TimeoutError) as failure:
            logger.debug("%s cannot be reached: %s", peer, failure)
