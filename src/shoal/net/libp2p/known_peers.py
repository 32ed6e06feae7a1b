"""The way back into the table after a silence.

hivemind drops a node from its table, and bans it for a while, as soon as one call is not answered, and never looks for
it again: a few seconds without network empty the table for ever. So we remember whom we met there, call those again who
are missing, and tell "nobody answers" from "nobody is there".
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from hivemind.p2p import PeerID

from shoal.net.addresses import by_peer
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.records import Announcement
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ServerState

logger = logging.getLogger(__name__)

MAX_KNOWN = 64
CHECK_SECONDS = 10.0
"""So often those who are missing from the table are called."""
REDIAL_SECONDS = 3.0
FORGET_SECONDS = 3600.0


class KnownPeers:
    """Whom this peer can rejoin the table by: its initial peers, and those who were in its table lately."""

    def __init__(
        self,
        own: str,
        *,
        initial_peers: Sequence[str],
        keeps_records: bool,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self._own = own
        self._initial = {peer: places for peer, places in by_peer(initial_peers).items() if peer != own}
        self._keeps_records = keeps_records
        self._check_seconds = check_seconds
        self._daemon: Daemon | None = None
        self._node: Any = None
        self._met: dict[str, float] = {}  # when each was in the table, the latest at the end
        self._said: dict[str, Announcement] = {}  # the newest that each announced
        self._last_touch: float | None = None
        self._rejoining: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    def attach(self, daemon: Daemon, node: Any) -> None:
        """From now on the table is this one."""
        self._daemon, self._node = daemon, node
        self._present()
        if self._checking is None:
            self._checking = asyncio.create_task(self._keep_in_touch())

    async def close(self) -> None:
        tasks = [task for task in (self._checking, self._rejoining) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def record(self, announcement: Announcement) -> None:
        """Where one of them says that it is, or that it leaves."""
        peer = announcement.peer
        if peer in self._met and (peer not in self._said or self._said[peer].expires < announcement.expires):
            self._said[peer] = announcement

    @property
    def lost(self) -> bool:
        """Whether nobody is left in a table that others were in, though not all of them said goodbye.

        A peer that keeps records believes so only as long as a record may last: afterwards whatever the others said has
        ended, and those who do not come back have left the swarm to it.
        """
        if self._present() or self._last_touch is None or all(map(self._said_goodbye, self._known())):
            return False
        return not self._keeps_records or time.monotonic() - self._last_touch < MAX_LIFETIME

    async def rejoin(self) -> None:
        """Call everybody whom we know; whoever answers is in the table again. All who need it wait for one attempt."""
        if self._rejoining is None or self._rejoining.done():
            self._rejoining = asyncio.create_task(self._rejoin())
        await asyncio.shield(self._rejoining)

    def _known(self) -> set[str]:
        return self._initial.keys() | self._met.keys()

    def _said_goodbye(self, peer: str) -> bool:
        return peer in self._said and self._said[peer].state is ServerState.LEAVING

    def _present(self) -> set[str]:
        """Who is in the table and may be called."""
        table, banned = self._node.protocol.routing_table.peer_id_to_uid, self._node.blacklist
        present = {peer.to_base58() for peer in table if peer not in banned} - {self._own}
        now = time.monotonic()
        if present:
            self._last_touch = now
        for peer in present:
            self._met.pop(peer, None)
            self._met[peer] = now
        for peer in [*self._met]:
            if len(self._met) > MAX_KNOWN or now - self._met[peer] > FORGET_SECONDS:
                del self._met[peer]
                self._said.pop(peer, None)
        return present

    async def _keep_in_touch(self) -> None:
        while True:
            await asyncio.sleep(self._check_seconds)
            present = self._present()
            if present:
                await self._call(self._known() - present)
            else:
                await self.rejoin()

    async def _rejoin(self) -> None:
        known = self._known()
        await self._call(known)
        if not self._present():
            await asyncio.gather(*(self._dial(peer) for peer in known))
            await self._call(known)
        if known and self._present():
            # All were silent at once: it was not for their sake that we did not hear them. But until one of them
            # answers they stay banned, for those who are in the table and not banned count as there.
            self._node.blacklist.clear()
            logger.info("in touch with the directory again")

    async def _call(self, peers: Iterable[str]) -> None:
        node = self._node

        async def call(peer: str) -> None:
            peer_id = PeerID.from_base58(peer)
            # An answer puts it into our table and us into its own; no answer is no error.
            if await node.protocol.call_ping(peer_id) is not None:
                node.blacklist.register_success(peer_id)

        await asyncio.gather(*(call(peer) for peer in peers))

    async def _dial(self, peer: str) -> None:
        said = self._said[peer].server_info.addresses if peer in self._said else ()
        places = dict.fromkeys((*self._initial.get(peer, ()), *said))
        assert self._daemon is not None
        try:
            async with asyncio.timeout(REDIAL_SECONDS):
                await self._daemon.connect(peer, [*places])
        except (DaemonFailed, TimeoutError) as failure:
            logger.debug("%s cannot be reached: %s", peer, failure)
